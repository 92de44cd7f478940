from __future__ import annotations

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from baton.client import AsyncClient
from baton.errors import UnauthenticatedError
from baton.v1 import inference_pb2
from bench.mock_workers.cluster import MockCluster
from router.api_keys import ApiKeys
from tests.router.conftest import StartRouter, request_of

KEYS = ["first-key", "second-key"]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_every_configured_key_is_valid(key: str, scheme: str) -> None:
    ApiKeys(KEYS).check(f"{scheme} {key}")


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Bearer first", "Bearer first-keyy", "first-key", "Basic first-key"]
)
def test_everything_else_is_refused_without_saying_what_was_sent(header: str | None) -> None:
    with pytest.raises(UnauthenticatedError) as caught:
        ApiKeys(KEYS).check(header)
    assert str(caught.value) == "authorization: a valid API key is required, as Bearer KEY"


@pytest.mark.parametrize("header", [None, "nonsense", "Bearer \udcff"])
def test_without_keys_nobody_is_asked(header: str | None) -> None:
    assert not ApiKeys([]).required
    ApiKeys([]).check(header)


def test_a_key_that_is_no_text_is_refused() -> None:
    with pytest.raises(UnauthenticatedError):
        ApiKeys(KEYS).check("Bearer \udcff")


async def test_calls_need_a_key_and_probes_do_not(start_router: StartRouter) -> None:
    async with MockCluster() as cluster, start_router(cluster, router={"api_keys": KEYS}) as client:
        # The fixture has waited for the health service without a key.
        assert (await client.stub.GetModelInfo(_INFO, metadata=_bearer("second-key"))).name == "mock"
        for metadata in ((), _bearer("third-key")):
            calls = [
                client.stub.GetModelInfo(_INFO, metadata=metadata),
                client.stub.Generate(request_of(), metadata=metadata),
            ]
            for call in calls:
                assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
                assert await call.details() == "authorization: a valid API key is required, as Bearer KEY"
        assert cluster.decode[0].reserves == []
        health = await health_pb2_grpc.HealthStub(client.channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        call = reflection_pb2_grpc.ServerReflectionStub(client.channel).ServerReflectionInfo(iter([ask]))
        services = [service.name for service in (await call.read()).list_services_response.service]
        assert "baton.v1.Inference" in services
        call.cancel()


async def test_the_client_sends_its_key(start_router: StartRouter) -> None:
    async with MockCluster() as cluster, start_router(cluster, router={"api_keys": KEYS}) as client:
        target = client.server.grpc_address
        async with AsyncClient(target, api_key="first-key") as keyed:
            assert (await keyed.generate("hello world", max_tokens=3, timeout_s=30)).usage.completion_tokens == 3
        async with AsyncClient(target) as keyless:
            with pytest.raises(UnauthenticatedError, match="API key is required"):
                await keyless.status()


_INFO = inference_pb2.GetModelInfoRequest()


def _bearer(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)
