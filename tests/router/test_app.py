from __future__ import annotations

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tokenizers import Tokenizer

import baton
from baton.v1 import inference_pb2
from bench.mock_workers.cluster import MockCluster
from tests.router.conftest import BOS, EOS, Client, StartRouter, request_of


async def error_of(client: Client, request: inference_pb2.GenerateRequest) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.generate(request)
    return caught.value.code(), caught.value.details() or ""


async def test_model_info(start_router: StartRouter) -> None:
    async with MockCluster() as cluster, start_router(cluster) as client:
        info = await client.stub.GetModelInfo(inference_pb2.GetModelInfoRequest())
        assert info == inference_pb2.GetModelInfoResponse(
            name="mock",
            architecture="MockForCausalLM",
            vocab_size=300,
            max_model_len=512,
            dtype="float32",
            block_size=16,
            eos_token_ids=[EOS],
            bos_token_id=BOS,
            max_n=16,
            max_logprobs=20,
        )


async def test_model_info_before_any_worker_has_joined(start_router: StartRouter) -> None:
    async with (
        MockCluster(num_prefill=0, num_decode=0) as cluster,
        start_router(cluster, wait_ready=False) as client,
    ):
        with pytest.raises(grpc.aio.AioRpcError, match="no decode worker has joined yet"):
            await client.stub.GetModelInfo(inference_pb2.GetModelInfoRequest())


async def test_cluster_status(start_router: StartRouter) -> None:
    async with MockCluster() as cluster, start_router(cluster) as client:
        cluster.decode[0].step_gate.clear()
        call = client.stream(request_of(max_tokens=2))
        await call.read()
        status = await client.stub.GetClusterStatus(inference_pb2.GetClusterStatusRequest())
        assert (status.version, status.model, status.ready) == (baton.__version__, "mock", True)
        assert (status.queued, status.running) == (0, 1)
        assert [(worker.role, worker.name, worker.epoch, worker.healthy) for worker in status.workers] == [
            ("prefill", "prefill-0", 1, True),
            ("decode", "decode-0", 2, True),
        ]
        assert status.workers[1].address == cluster.decode[0].address
        assert (status.workers[1].free_blocks, status.workers[1].total_blocks) == (64, 64)
        call.cancel()


async def test_tokenize_and_detokenize(start_router: StartRouter, tokenizer: Tokenizer) -> None:
    async with MockCluster() as cluster, start_router(cluster) as client:
        ids = (await client.stub.Tokenize(inference_pb2.TokenizeRequest(text="hello world"))).token_ids
        assert list(ids) == tokenizer.encode("hello world").ids
        bare = inference_pb2.TokenizeRequest(text="hello world", add_special_tokens=False)
        assert list((await client.stub.Tokenize(bare)).token_ids) == list(ids)[1:]
        both = inference_pb2.DetokenizeRequest(token_ids=ids)
        assert (await client.stub.Detokenize(both)).text == "<s>hello world"
        both.skip_special_tokens = True
        assert (await client.stub.Detokenize(both)).text == "hello world"
        with pytest.raises(grpc.aio.AioRpcError, match="token_ids: 300 is not below"):
            await client.stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=[300]))


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        (request_of([5] * 512), "INVALID_ARGUMENT", "prompt: has 512 tokens"),
        (request_of([]), "INVALID_ARGUMENT", "prompt: "),
        (request_of([300]), "INVALID_ARGUMENT", "token_ids: 300"),
        (request_of(temperature=-1.0), "INVALID_ARGUMENT", "sampling.temperature: "),
        (request_of(max_tokens=512), "INVALID_ARGUMENT", "sampling.max_tokens: "),
        (request_of(n=17), "INVALID_ARGUMENT", "sampling.n: must be from 1 to 16"),
        (request_of(model="gpt"), "NOT_FOUND", "model: 'gpt' is not served"),
        (request_of(model="x" * 100_000), "NOT_FOUND", "model: "),
        (inference_pb2.GenerateRequest(), "INVALID_ARGUMENT", "prompt: "),
    ],
)
async def test_what_is_wrong_with_a_request_is_said(
    start_router: StartRouter, request_: inference_pb2.GenerateRequest, status: str, message: str
) -> None:
    async with MockCluster() as cluster, start_router(cluster) as client:
        code, details = await error_of(client, request_)
        assert code.name == status
        assert details.startswith(message)
        assert cluster.decode[0].reserves == []


async def test_a_message_over_the_limit_is_refused_and_the_router_lives(start_router: StartRouter) -> None:
    async with MockCluster() as cluster, start_router(cluster, router={"max_message_bytes": 1 << 16}) as client:
        code, _ = await error_of(client, request_of("x" * (1 << 17)))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await client.generate(request_of(max_tokens=2))


async def test_a_bug_is_internal_and_says_nothing_of_itself(
    start_router: StartRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with MockCluster() as cluster, start_router(cluster) as client:

        def broken(self: object, *args: object) -> None:
            raise KeyError("secret")

        monkeypatch.setattr("router.emission.Emission.take", broken)
        assert await error_of(client, request_of()) == (
            grpc.StatusCode.INTERNAL,
            "internal error; see the router's log",
        )


async def test_health_follows_the_workers(start_router: StartRouter) -> None:
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    async with MockCluster() as cluster, start_router(cluster) as client:
        stub = health_pb2_grpc.HealthStub(client.channel)
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status == serving
        await cluster.prefill[0].stop()
        await client.until_health(not_serving)
        await cluster.add_prefill("prefill-0")
        await cluster.publish()
        await client.until_health(serving)


async def test_reflection_names_the_service(start_router: StartRouter) -> None:
    async with MockCluster() as cluster, start_router(cluster) as client:
        stub = reflection_pb2_grpc.ServerReflectionStub(client.channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        response = await call.read()
        names = [service.name for service in response.list_services_response.service]
        assert "baton.v1.Inference" in names
        call.cancel()
