"""The asyncio client against a scripted server; what both clients share is tested with the blocking one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest
import pytest_asyncio

from baton import errors
from baton.client import AsyncClient
from baton.v1 import inference_pb2
from tests.baton.fake_inference import FakeInference, ending, piece, serving


@pytest.fixture
def server() -> Iterator[FakeInference]:
    with serving() as fake:
        yield fake


@pytest_asyncio.fixture
async def client(server: FakeInference) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.target) as connected:
        yield connected


async def test_a_completion_joins_the_pieces(server: FakeInference, client: AsyncClient) -> None:
    server.responses = [piece("Once", 5), piece(" upon", 6, finish=2), ending(4, 1, 2)]
    completion = await client.generate("tell", max_tokens=2)
    assert (completion.text, completion.usage.cached_tokens) == ("Once upon", 1)
    assert server.requests[0].sampling.max_tokens == 2


async def test_a_stream_gives_each_message_and_closing_it_cancels(server: FakeInference, client: AsyncClient) -> None:
    server.responses, server.stall = [piece("a", 1), piece("b", 2)], True
    stream = client.stream("tell")
    assert [(await anext(stream)).text, (await anext(stream)).text] == ["a", "b"]
    await stream.aclose()
    assert await asyncio.to_thread(server.cancelled.wait, 10)


async def test_cancelling_the_task_cancels_the_call(server: FakeInference, client: AsyncClient) -> None:
    server.responses, server.stall = [piece("a", 1)], True
    arrived = asyncio.Event()

    async def consume() -> None:
        async for _ in client.stream("tell"):
            arrived.set()

    task = asyncio.create_task(consume())
    await arrived.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(server.cancelled.wait, 10)


async def test_a_failed_call_raises_batons_error(server: FakeInference, client: AsyncClient) -> None:
    server.failure = (grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
    with pytest.raises(errors.OverloadedError, match="the queue is full"):
        await client.generate("tell")


async def test_the_deadline_ends_the_call(server: FakeInference, client: AsyncClient) -> None:
    server.stall = True
    with pytest.raises(errors.DeadlineError):
        await client.generate("tell", timeout_s=0.2)
    assert await asyncio.to_thread(server.cancelled.wait, 10)


async def test_the_small_calls(server: FakeInference, client: AsyncClient) -> None:
    server.status = inference_pb2.GetClusterStatusResponse(model="demo")
    assert (await client.model_info()).block_size == 16
    assert (await client.status()).model == "demo"
    assert await client.tokenize("ab") == (1, 97, 98)
    assert await client.detokenize([97, 98]) == "ab"
