from __future__ import annotations

import asyncio
import contextlib
import gzip
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route

from baton.metrics import HttpMetrics
from bench.mock_workers.cluster import MockCluster
from router.http_metrics import HttpMetricsMiddleware, MetricsEndpoint
from tests.router.conftest import StartRouter


async def hello(request: Request) -> Response:
    return PlainTextResponse("hello")


async def fail(request: Request) -> Response:
    raise RuntimeError("a bug")


async def stream(request: Request) -> Response:
    async def parts() -> AsyncIterator[str]:
        yield "first"
        await asyncio.Event().wait()

    return StreamingResponse(parts())


ROUTES = [
    Route("/hello", hello),
    Route("/items/{name}", hello, methods=["POST"]),
    Route("/fail", fail),
    Route("/stream", stream),
    Mount("/static", routes=[Route("/{path:path}", hello)]),
]


class Counted:
    """An application, and what was counted around it."""

    def __init__(self, routes: Sequence[BaseRoute] = ROUTES) -> None:
        self.registry = CollectorRegistry()
        app = Starlette(routes=list(routes))
        self.app = HttpMetricsMiddleware(app, HttpMetrics(self.registry), app.routes)

    async def request(self, method: str, path: str) -> int:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://router") as http:
            return (await http.request(method, path)).status_code

    def counted(self) -> dict[tuple[str, str], float]:
        """(route, status) of all calls."""
        (family,) = [family for family in self.registry.collect() if family.name == "baton_http_requests"]
        samples = [sample for sample in family.samples if sample.value and sample.name.endswith("_total")]
        return {(sample.labels["route"], sample.labels["status"]): sample.value for sample in samples}


@pytest.mark.parametrize(
    ("method", "path", "status", "route"),
    [
        ("GET", "/hello", 200, "/hello"),
        ("POST", "/items/a", 200, "/items/{name}"),
        ("GET", "/items/a", 405, "/items/{name}"),
        ("GET", "/static/a/b", 200, "/static"),
        ("GET", "/fail", 500, "/fail"),
        ("GET", "/nowhere", 404, "other"),
        ("GET", "/%00/etc/passwd", 404, "other"),
    ],
)
async def test_calls_are_counted_by_pattern_and_status(method: str, path: str, status: int, route: str) -> None:
    counted = Counted()
    assert await counted.request(method, path) == status
    assert counted.counted() == {(route, str(status)): 1}
    assert counted.registry.get_sample_value("baton_http_request_duration_seconds_count", {"route": route}) == 1
    assert counted.registry.get_sample_value("baton_http_requests_in_flight") == 0


async def test_a_client_that_hangs_up_is_no_success() -> None:
    """As uvicorn does it: the application hears of it through `receive`."""
    counted = Counted()
    sent = asyncio.Event()

    async def receive() -> dict[str, Any]:
        await sent.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            assert counted.registry.get_sample_value("baton_http_requests_in_flight") == 1
            sent.set()

    scope = {"type": "http", "method": "GET", "path": "/stream", "headers": [], "query_string": b"", "root_path": ""}
    with contextlib.suppress(BaseException):
        await counted.app(scope, receive, send)
    assert counted.counted() == {("/stream", "499"): 1}
    assert counted.registry.get_sample_value("baton_http_requests_in_flight") == 0


def test_routes_are_there_from_the_start() -> None:
    registry = Counted().registry
    assert registry.get_sample_value("baton_http_requests_total", {"route": "/hello", "status": "200"}) == 0


async def test_other_protocols_pass() -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    await HttpMetricsMiddleware(app, HttpMetrics(CollectorRegistry()), [])({"type": "lifespan"}, None, None)  # type: ignore[arg-type]
    assert seen == ["lifespan"]


class TestMetricsEndpoint:
    async def get(self, headers: dict[str, str]) -> httpx.Response:
        registry = CollectorRegistry()
        HttpMetrics(registry)
        app = Starlette(routes=[Route("/metrics", MetricsEndpoint(registry))])
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://router") as http:
            request = http.build_request("GET", "/metrics", headers=headers)
            return await http.send(request, stream=True)

    async def test_text_by_default(self) -> None:
        answer = await self.get({"accept-encoding": "identity"})
        assert answer.headers["content-type"].startswith("text/plain; version=")
        assert b"# TYPE baton_http_requests_total counter" in await answer.aread()

    async def test_openmetrics_if_asked(self) -> None:
        answer = await self.get(
            {"accept": "application/openmetrics-text; version=1.0.0", "accept-encoding": "identity"}
        )
        assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
        assert (await answer.aread()).endswith(b"# EOF\n")

    async def test_compressed_if_asked(self) -> None:
        answer = await self.get({"accept-encoding": "gzip"})
        assert answer.headers["content-encoding"] == "gzip"
        raw = b"".join([part async for part in answer.aiter_raw()])
        assert gzip.decompress(raw).startswith(b"# HELP")


async def test_a_router_counts_its_calls(start_router: StartRouter) -> None:
    async with (
        MockCluster() as cluster,
        start_router(cluster) as client,
        httpx.AsyncClient(base_url=f"http://{client.server.http_address}") as http,
    ):
        await http.get("/health")
        metrics = (await http.get("/metrics")).text
    assert 'baton_http_requests_total{route="/health",status="200"} 1.0' in metrics
    assert 'baton_http_requests_total{route="/targets",status="200"} 0.0' in metrics
