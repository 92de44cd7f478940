from __future__ import annotations

import asyncio
import pathlib
import socket

import grpc
import pytest
from grpc_health.v1 import health_pb2

from baton.config import DecodeConfig, ModelConfig, RouterConfig, RouterProcessConfig, TransferConfig
from bench.mock_workers.cluster import MockCluster
from router.server import RouterServer
from tests.router.conftest import StartRouter, next_of, request_of, rest_of, tokens_of


async def test_draining_finishes_what_runs_and_refuses_what_comes(start_router: StartRouter) -> None:
    async with MockCluster() as cluster, start_router(cluster) as client:
        cluster.decode[0].step_gate.clear()
        call = client.stream(request_of(max_tokens=4))
        first = await next_of(call)
        draining = asyncio.create_task(client.server.drain(30))
        await client.until_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        assert not client.server.ready
        with pytest.raises(grpc.aio.AioRpcError, match="the router is draining") as caught:
            await client.generate(request_of())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert not draining.done()
        cluster.decode[0].step_gate.set()
        assert tokens_of([first, *(await rest_of(call))]) == [40, 41, 42, 43]
        await draining


async def test_draining_ends_after_its_time(start_router: StartRouter) -> None:
    async with MockCluster() as cluster, start_router(cluster) as client:
        cluster.decode[0].step_gate.clear()
        call = client.stream(request_of(max_tokens=4))
        await next_of(call)
        await client.server.drain(0.05)
        assert client.server.pipeline.num_running == 1
        call.cancel()


async def test_stopping_ends_what_waits(start_router: StartRouter) -> None:
    async with MockCluster() as cluster:
        async with start_router(cluster) as client:
            cluster.decode[0].publish(running=1, free_blocks=0)
            waiting = asyncio.create_task(client.stream(request_of()).code())
            await client.until_status(lambda status: status.queued)
            await client.server.stop()
            assert await waiting is grpc.StatusCode.UNAVAILABLE
        assert cluster.decode[0].reserves == []


def config_for(path: pathlib.Path, *, grpc_port: int = 0, http_port: int = 0) -> RouterProcessConfig:
    return RouterProcessConfig(
        model=ModelConfig(path=str(path)),
        router=RouterConfig(grpc_port=grpc_port, http_port=http_port),
        decode=DecodeConfig(),
        transfer=TransferConfig(),
        membership_address="127.0.0.1:1",
    )


@pytest.mark.parametrize("port", ["grpc_port", "http_port"])
async def test_a_port_that_is_taken_is_an_error(checkpoint: pathlib.Path, port: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = RouterServer(config_for(checkpoint, **{port: taken.getsockname()[1]}))
        with pytest.raises(OSError, match=str(taken.getsockname()[1])):
            await server.start()
        await server.stop()


async def test_a_folder_without_tokenizer_is_an_error(checkpoint: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        RouterServer(config_for(tmp_path))
