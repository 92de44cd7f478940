"""Prometheus HTTP service discovery: every worker's metrics endpoint as workers come and go, and the router's own.

https://prometheus.io/docs/prometheus/latest/http_sd/
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from typing import TypedDict

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from router.snapshot import ClusterSnapshot, WorkerView

_DEFAULT_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:(?P<port>[0-9]{1,5}))?")


class TargetGroup(TypedDict):
    """One entry of the answer. Labels that begin with `__meta_` are there for relabelling and are not stored."""

    targets: list[str]
    labels: dict[str, str]


def target_groups(snapshot: ClusterSnapshot, *, router: str, scheme: str, model: str) -> list[TargetGroup]:
    """All that can be scraped, one group each.

    Args:
        router, scheme: host:port of the router's own /metrics, and how to speak to it; workers speak plain HTTP.
    """
    own = {"role": "router", "worker": "router", "model": model, "__scheme__": scheme}
    views = (*snapshot.prefill, *snapshot.decode)
    return [
        {"targets": [router], "labels": own},
        *(_group(view, view.key.name, view.metrics_address, model) for view in views if view.metrics_address),
        *(
            _group(view, f"{view.key.name}/{rank}", address, model)
            for view in views
            for rank, address in enumerate(view.rank_metrics_addresses, 1)
        ),
    ]


def router_target(listens_on: str, asked_as: str | None, scheme: str = "http") -> str:
    """Where whoever asks can scrape the router itself.

    An address that means "all of this host's", or that only this host knows, tells others nothing: then it is what the
    asker called the router, which worked at least once.

    Args:
        listens_on: host:port.
        asked_as: the Host header.
        scheme: what it was asked by, which says what a missing port means.
    """
    host, _, port = listens_on.rpartition(":")
    asked = _HOST.fullmatch(asked_as or "")
    if asked is None or not _is_unspecific(host.strip("[]")):
        return f"{host or 'localhost'}:{port}"
    return f"{asked['host']}:{asked['port'] or _DEFAULT_PORTS[scheme]}"


def targets_route(*, snapshot: Callable[[], ClusterSnapshot], listens_on: Callable[[], str], model: str) -> Route:
    """The route /targets.

    Args:
        listens_on: host:port of the server that the route is part of.
    """

    async def targets(request: Request) -> Response:
        scheme = request.url.scheme
        router = router_target(listens_on(), request.headers.get("host"), scheme)
        groups = target_groups(snapshot(), router=router, scheme=scheme, model=model)
        return JSONResponse(groups)

    return Route("/targets", targets)


def _group(view: WorkerView, name: str, address: str, model: str) -> TargetGroup:
    return {
        "targets": [address],
        "labels": {
            "role": view.role,
            "worker": name,
            "model": model,
            "__scheme__": "http",
            "__meta_baton_epoch": str(view.key.epoch),
            "__meta_baton_pid": str(view.pid),
        },
    }


def _is_unspecific(host: str) -> bool:
    """Whether a host is empty, a wildcard or a loopback address."""
    if host in ("", "localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_unspecified or address.is_loopback
