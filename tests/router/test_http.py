from __future__ import annotations

import asyncio

import httpx
from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from bench.mock_workers.cluster import MockCluster
from router.http import create_app
from tests.router.conftest import Client, StartRouter, request_of, responses_of, tokens_of


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
        assert 'baton_workers{worker_role="decode"} 1.0' in metrics


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


async def test_a_client_that_leaves_with_the_last_message_has_not_cancelled(start_router: StartRouter) -> None:
    async with MockCluster() as cluster, start_router(cluster) as client:
        responses = responses_of(client.server.pipeline, request_of(max_tokens=3))
        async for response in responses:
            if response.HasField("usage"):
                break
        await responses.aclose()
        metrics = (await get(client, "/metrics")).text
        assert 'baton_requests_total{outcome="length"} 1.0' in metrics
        assert 'baton_requests_total{outcome="cancelled"} 0.0' in metrics


async def test_an_api_adds_its_routes() -> None:
    async def hello(request: Request) -> Response:
        return PlainTextResponse("hello")

    app = create_app(is_ready=lambda: True, registry=CollectorRegistry(), api_routes=[Route("/v1/hello", hello)])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://router") as http:
        assert (await http.get("/v1/hello")).text == "hello"


async def test_headers_without_end_are_refused(start_router: StartRouter) -> None:
    async with MockCluster() as cluster, start_router(cluster) as client:
        host, _, port = client.server.http_address.partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * (1 << 20))
        assert (await reader.readline()).startswith(b"HTTP/1.1 400 ")
        writer.close()


async def test_an_upgrade_that_is_offered_is_ignored(start_router: StartRouter) -> None:
    """Java's client offers HTTP/2 with each request."""
    offer = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAAQAAP__"}
    async with (
        MockCluster() as cluster,
        start_router(cluster) as client,
        httpx.AsyncClient(base_url=client.server.url, headers=offer) as http,
    ):
        for _ in range(2):
            assert (await http.post("/tokenize", json={"prompt": "hello"})).status_code == 200


async def test_a_whole_request_goes_through_http(start_router: StartRouter) -> None:
    async with MockCluster() as cluster, start_router(cluster) as client:
        async with httpx.AsyncClient(base_url=client.server.url) as http:
            answer = await http.post(
                "/v1/completions", json={"prompt": "hello", "max_tokens": 4, "return_token_ids": True}
            )
        expected = await client.generate(request_of("hello", max_tokens=4))
        assert answer.json()["choices"][0]["token_ids"] == tokens_of(expected)
