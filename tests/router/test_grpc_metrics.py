from __future__ import annotations

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.v1 import inference_pb2
from bench.mock_workers.cluster import MockCluster
from tests.router.conftest import Client, StartRouter, next_of, request_of

PREFIX = "/baton.v1.Inference/"


def calls(client: Client, method: str, status: str) -> float | None:
    return client.server._registry.get_sample_value(
        "baton_grpc_calls_total", {"method": PREFIX + method, "status": status}
    )


async def test_calls_are_counted_by_method_and_status(start_router: StartRouter) -> None:
    async with MockCluster() as cluster, start_router(cluster) as client:
        assert calls(client, "Generate", "ok") == 0
        await client.generate(request_of(max_tokens=3))
        await client.generate(request_of(max_tokens=3))
        assert calls(client, "Generate", "ok") == 2
        assert await client.stream(request_of(n=99)).code() is grpc.StatusCode.INVALID_ARGUMENT
        before = calls(client, "GetModelInfo", "ok")
        await client.stub.GetModelInfo(inference_pb2.GetModelInfoRequest())
        # Told the client before it was counted; by now it is.
        assert calls(client, "Generate", "invalid_argument") == 1
        assert calls(client, "GetModelInfo", "ok") == (before or 0) + 1
        name = "baton_grpc_call_duration_seconds_count"
        assert client.server._registry.get_sample_value(name, {"method": PREFIX + "Generate"}) == 3


async def test_a_cancelled_call(start_router: StartRouter) -> None:
    async with MockCluster(step_s=0.01) as cluster, start_router(cluster) as client:
        call = client.stream(request_of(max_tokens=400))
        await next_of(call)
        assert client.server._registry.get_sample_value("baton_grpc_calls_in_flight") == 1
        call.cancel()
        await cluster.decode[0].until(lambda: calls(client, "Generate", "cancelled") == 1)
        assert client.server._registry.get_sample_value("baton_grpc_calls_in_flight") == 0


async def test_other_services_are_left_alone(start_router: StartRouter) -> None:
    async with MockCluster() as cluster, start_router(cluster) as client:
        stub: health_pb2_grpc.HealthAsyncStub = health_pb2_grpc.HealthStub(client.channel)
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
        (family,) = [f for f in client.server._registry.collect() if f.name == "baton_grpc_calls"]
        assert {sample.labels["method"].partition(PREFIX)[0] for sample in family.samples} == {""}
        with pytest.raises(grpc.aio.AioRpcError):
            await client.channel.unary_unary(PREFIX + "Nothing")(b"")  # type: ignore[arg-type]
        assert calls(client, "Nothing", "unimplemented") is None
