"""OTLP collectors on real ports, over gRPC and over HTTP, that keep the spans they are sent."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1 import common_pb2

# How long the HTTP server takes to notice that it is to stop.
POLL_S = 0.01


@dataclasses.dataclass(frozen=True)
class ReceivedSpan:
    """One span; ids in hexadecimal, times in nanoseconds, `error` None where its status is not ERROR."""

    service: str
    instance: str
    name: str
    kind: int
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    events: dict[str, dict[str, Any]]
    error: str | None


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Everything that was exported to it.

    Attributes:
        endpoint: what OTEL_EXPORTER_OTLP_ENDPOINT must be.
    """

    def __init__(self) -> None:
        self._arrived = threading.Condition()
        self._spans: list[ReceivedSpan] = []
        self.endpoint = ""

    def Export(self, request: Any, context: grpc.ServicerContext | None) -> Any:  # noqa: N802
        spans = [
            _received(resource.resource.attributes, span)
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        with self._arrived:
            self._spans += spans
            self._arrived.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    @property
    def spans(self) -> list[ReceivedSpan]:
        """In the order of their start."""
        with self._arrived:
            return sorted(self._spans, key=lambda span: span.start_ns)

    def wait_for(self, *names: str, timeout_s: float = 20.0) -> list[ReceivedSpan]:
        """All spans, when there is one of each of these names."""
        with self._arrived:
            arrived = self._arrived.wait_for(lambda: {span.name for span in self._spans} >= set(names), timeout_s)
            assert arrived, [span.name for span in self._spans]
        return self.spans


@contextlib.contextmanager
def grpc_collector() -> Iterator[Collector]:
    with ThreadPoolExecutor(2) as pool:
        collector = Collector()
        server = grpc.server(pool)
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
        collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        try:
            yield collector
        finally:
            server.stop(None).wait()


@contextlib.contextmanager
def http_collector() -> Iterator[Collector]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["content-length"]))
            answer = collector.Export(trace_service_pb2.ExportTraceServiceRequest.FromString(body), None)
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.end_headers()
            self.wfile.write(answer.SerializeToString())

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=[POLL_S])
        thread.start()
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join()


def _received(resource: Any, span: Any) -> ReceivedSpan:
    of_process = _attributes(resource)
    return ReceivedSpan(
        service=of_process["service.name"],
        instance=of_process["service.instance.id"],
        name=span.name,
        kind=span.kind,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        attributes=_attributes(span.attributes),
        events={event.name: _attributes(event.attributes) for event in span.events},
        error=span.status.message if span.status.code == 2 else None,
    )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: common_pb2.AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, kind or "string_value")
