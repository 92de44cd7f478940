from __future__ import annotations

import httpx
from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from router.http import create_app
from tests.router.conftest import Client, StartRouter, request_of
from tests.router.mock_cluster import MockCluster


async def get(client: Client, path: str) -> httpx.Response:
    async with httpx.AsyncClient(base_url=f"http://{client.server.http_address}") as http:
        return await http.get(path)


async def test_liveness_readiness_and_metrics(start_router: StartRouter) -> None:
    async with MockCluster() as cluster, start_router(cluster) as client:
        assert (await get(client, "/health")).status_code == 200
        assert (await get(client, "/ready")).status_code == 200
        await client.generate(request_of(max_tokens=5))
        metrics = (await get(client, "/metrics")).text
        assert 'baton_requests_total{outcome="length"} 1.0' in metrics
        assert "baton_generation_tokens_total 5.0" in metrics
        assert 'baton_prefill_decisions_total{decision="remote"} 1.0' in metrics
        assert "baton_inter_token_latency_seconds_count 4.0" in metrics
        assert "baton_requests_running 0.0" in metrics
        assert 'baton_workers{role="decode"} 1.0' in metrics


async def test_alive_and_not_ready_without_workers(start_router: StartRouter) -> None:
    async with (
        MockCluster(num_prefill=0, num_decode=0) as cluster,
        start_router(cluster, wait_ready=False) as client,
    ):
        assert (await get(client, "/health")).status_code == 200
        assert (await get(client, "/ready")).status_code == 503


async def test_refusals_are_counted_by_status(start_router: StartRouter) -> None:
    async with MockCluster() as cluster, start_router(cluster) as client:
        for _ in range(2):
            await client.stream(request_of(n=99)).code()
        metrics = (await get(client, "/metrics")).text
        assert 'baton_requests_rejected_total{reason="invalid_argument"} 2.0' in metrics


async def test_an_api_adds_its_routes() -> None:
    async def hello(request: Request) -> Response:
        return PlainTextResponse("hello")

    app = create_app(is_ready=lambda: True, registry=CollectorRegistry(), api_routes=[Route("/v1/hello", hello)])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://router") as http:
        assert (await http.get("/v1/hello")).text == "hello"
