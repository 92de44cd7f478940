"""Series of the router's two servers, call by call: also of calls that never become a request."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry

from baton.metrics import buckets
from baton.metrics.families import Families


class HttpMetrics:
    """HTTP calls. `route` is the pattern that matched, so its values are as many as there are routes."""

    def __init__(self, registry: CollectorRegistry) -> None:
        make = Families(registry)
        self.requests = make.counter(
            "baton_http_requests",
            "HTTP calls that ended, by route and status; 499 where the client hung up first.",
            route=(),
            status=(),
        )
        self.duration_s = make.histogram(
            "baton_http_request_duration_seconds",
            "From a call's arrival to the last byte of its answer, by route.",
            buckets.CALL,
            route=(),
        )
        self.in_flight = make.gauge("baton_http_requests_in_flight", "HTTP calls under way.")

    def expect(self, routes: Iterable[str]) -> None:
        """Initialises the series of these routes."""
        for route in routes:
            self.requests.labels(route, "200")
            self.duration_s.labels(route)


class GrpcMetrics:
    """gRPC calls. `method` is the method's full name; only registered ones are counted."""

    def __init__(self, registry: CollectorRegistry) -> None:
        make = Families(registry)
        self.calls = make.counter(
            "baton_grpc_calls", "gRPC calls that ended, by method and status.", method=(), status=()
        )
        self.duration_s = make.histogram(
            "baton_grpc_call_duration_seconds",
            "From a call's arrival to the end of its answer, by method.",
            buckets.CALL,
            method=(),
        )
        self.in_flight = make.gauge("baton_grpc_calls_in_flight", "gRPC calls under way.")

    def expect(self, methods: Iterable[str]) -> None:
        """Initialises the series of these methods."""
        for method in methods:
            self.calls.labels(method, "ok")
            self.duration_s.labels(method)
