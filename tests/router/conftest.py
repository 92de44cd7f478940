"""A checkpoint folder with a real tokenizer and no weights, and a router in front of mock workers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import pathlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from baton.config import DecodeConfig, ModelConfig, RouterConfig, RouterProcessConfig, TransferConfig
from baton.v1 import inference_pb2, inference_pb2_grpc
from bench.mock_workers.cluster import MockCluster
from router.openai.generation import Generates
from router.server import RouterServer
from router.sink import ResponseSink, Writer

BOS, EOS = 0, 1
CORPUS = ["the quick brown fox jumps over the lazy dog", "hello world, hello router", "naïve café — 日本語 🙂"]


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE of about 300 entries, with <s> and </s>, that puts <s> first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[AddedToken("<s>", special=True), AddedToken("</s>", special=True)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 5, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="session")
def checkpoint(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("mock-model")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["MockForCausalLM"],
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": 512,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS], "top_k": 7}))
    return folder


class Client:
    """The public API of one router under test."""

    def __init__(self, server: RouterServer, channel: grpc.aio.Channel) -> None:
        self.server = server
        self.channel = channel
        self.stub: inference_pb2_grpc.InferenceAsyncStub = inference_pb2_grpc.InferenceStub(channel)

    def stream(
        self, request: inference_pb2.GenerateRequest, timeout_s: float | None = 30.0
    ) -> grpc.aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]:
        return self.stub.Generate(request, timeout=timeout_s)

    async def generate(
        self, request: inference_pb2.GenerateRequest, timeout_s: float | None = 30.0
    ) -> list[inference_pb2.GenerateResponse]:
        return [response async for response in self.stream(request, timeout_s)]

    async def until_status(self, condition: Callable[[inference_pb2.GetClusterStatusResponse], object]) -> None:
        async with asyncio.timeout(10):
            while not condition(await self.stub.GetClusterStatus(inference_pb2.GetClusterStatusRequest())):
                pass

    async def until_connected(self, num_workers: int) -> None:
        """Readiness needs one worker of each role; some tests need all."""
        await self.until_status(lambda status: sum(worker.healthy for worker in status.workers) == num_workers)

    async def until_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        stub = health_pb2_grpc.HealthStub(self.channel)
        call = stub.Watch(health_pb2.HealthCheckRequest(service="baton.v1.Inference"), timeout=30)
        async for response in call:
            if response.status == status:
                break
        call.cancel()


def request_of(prompt: str | Sequence[int] = "hello world, the quick brown fox", **sampling: Any) -> Any:
    """A request; `request_id`, `model`, `priority` and `cache_salt` are the request's, all else sampling."""
    names = ("request_id", "model", "priority", "cache_salt")
    fields = {name: sampling.pop(name) for name in names if name in sampling}
    request = inference_pb2.GenerateRequest(sampling=inference_pb2.SamplingParams(**sampling), **fields)
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)
    return request


async def responses_of(
    pipeline: Generates, request: inference_pb2.GenerateRequest, timeout_s: float | None = None
) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
    """The responses, as a slow client takes them: while it reads none, one waits and the next is being written."""
    arrived: asyncio.Queue[bytes | Exception | None] = asyncio.Queue(1)

    async def generate() -> None:
        try:
            await pipeline.generate(request, ResponseSink(Writer(arrived.put)), timeout_s)
        except Exception as error:
            await arrived.put(error)
        else:
            await arrived.put(None)

    task = asyncio.create_task(generate())
    try:
        while (response := await arrived.get()) is not None:
            if isinstance(response, Exception):
                raise response
            yield inference_pb2.GenerateResponse.FromString(response)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def next_of(call: grpc.aio.UnaryStreamCall[Any, Any]) -> inference_pb2.GenerateResponse:
    """The next response of a stream."""
    response = await call.read()
    assert isinstance(response, inference_pb2.GenerateResponse)
    return response


async def rest_of(call: grpc.aio.UnaryStreamCall[Any, Any]) -> list[inference_pb2.GenerateResponse]:
    """What is still to come of a stream that was read from; grpc does not let it be iterated any more."""
    responses = []
    while isinstance(response := await call.read(), inference_pb2.GenerateResponse):
        responses.append(response)
    return responses


def tokens_of(responses: Sequence[inference_pb2.GenerateResponse], choice: int = 0) -> list[int]:
    deltas = [delta for response in responses for delta in response.choices if delta.index == choice]
    return [token_id for delta in deltas for token_id in delta.token_ids]


def text_of(responses: Sequence[inference_pb2.GenerateResponse], choice: int = 0) -> str:
    deltas = [delta for response in responses for delta in response.choices if delta.index == choice]
    return "".join(delta.text for delta in deltas)


StartRouter = Callable[..., AbstractAsyncContextManager[Client]]


@pytest.fixture
def start_router(checkpoint: pathlib.Path) -> StartRouter:
    """Starts a router on a mock cluster and waits until it serves; values go to the config sections by name."""

    @contextlib.asynccontextmanager
    async def start(
        cluster: MockCluster,
        *,
        router: dict[str, Any] | None = None,
        decode: dict[str, Any] | None = None,
        transfer: dict[str, Any] | None = None,
        wait_ready: bool = True,
    ) -> AsyncIterator[Client]:
        config = RouterProcessConfig(
            model=ModelConfig(path=str(checkpoint), served_name="mock"),
            router=RouterConfig(grpc_port=0, http_port=0, **(router or {})),
            decode=DecodeConfig(**{"local_prefill_tokens": 0, "backlog_prefill_tokens": 0, **(decode or {})}),
            transfer=TransferConfig(**{"lease_s": 3.0, **(transfer or {})}),
            membership_address=cluster.membership.address,
        )
        server = RouterServer(config)
        await server.start()
        try:
            async with grpc.aio.insecure_channel(server.grpc_address) as channel:
                client = Client(server, channel)
                if wait_ready:
                    await client.until_health(health_pb2.HealthCheckResponse.SERVING)
                yield client
        finally:
            await server.stop()

    return start
