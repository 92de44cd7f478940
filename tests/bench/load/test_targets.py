"""Real servers through both protocols: a tiny one over HTTP, and Baton's router in front of mock workers."""

from __future__ import annotations

import contextlib
import pathlib
import socket
import sys
from collections.abc import AsyncIterator, Iterator

import pytest

from baton.config import ModelConfig, RouterConfig, ServeConfig
from baton.errors import BatonError, InternalError, InvalidRequestError, UnavailableError
from bench.load.outcome import Outcome
from bench.load.requests import LoadRequest, Turn
from bench.load.runner import run_load
from bench.load.targets import ServedModel, Target, open_target
from bench.load.workloads import as_chats
from router.server import RouterServer
from tests.bench.load.sse_server import SseServer, sse_server
from tests.bench.load.test_sse import DONE, text, usage
from tests.router.alone import running_router

MODEL = pathlib.Path(__file__).parents[3] / "deploy" / "demo" / "model"
END = b""


@pytest.fixture(scope="module")
def router() -> Iterator[RouterServer]:
    with running_router(ServeConfig(model=ModelConfig(path=str(MODEL)))) as server:
        yield server


@pytest.fixture
async def server() -> AsyncIterator[SseServer]:
    async with sse_server() as server:
        yield server


@contextlib.asynccontextmanager
async def opened(address: str, **options: object) -> AsyncIterator[Target]:
    target = open_target(address, **options)  # type: ignore[arg-type]
    try:
        yield target
    finally:
        await target.close()


async def send(target: Target, request: LoadRequest) -> Outcome:
    outcome = Outcome(request, 0.0)
    await target.send(outcome)
    return outcome


async def test_an_openai_server_is_asked_for_greedy_tokens_past_the_end(server: SseServer) -> None:
    server.answers.append([text("a"), text("b") + usage(2), DONE, END])
    async with opened(server.url + "/v1/", api_key="k-1") as target:
        assert await target.served_model() == ServedModel("tiny", None, 128)
        outcome = await send(target, LoadRequest([7, 8, 9], 2))
    assert (outcome.token_counts, outcome.output_tokens, outcome.prompt_tokens) == ([1, 1], 2, 3)
    ((path, head, body),) = server.requests
    assert path == "/v1/completions"
    assert "authorization: bearer k-1" in head
    assert body == {
        "model": "tiny",
        "prompt": [7, 8, 9],
        "max_tokens": 2,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def test_chats_and_continuous_usage(server: SseServer) -> None:
    server.answers.append([text("a"), DONE, END])
    async with opened(server.url, api="chat", model="tiny", continuous_usage=True) as target:
        await send(target, next(as_chats([LoadRequest([0, 1], 2)])))
    ((path, _, body),) = server.requests
    assert path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "user", "content": "the of"}]
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}


async def test_refusals_and_breaks_are_counted_by_kind_and_the_run_goes_on(server: SseServer) -> None:
    server.answers += [
        (429, "the queue is full"),
        (503, "no worker"),
        (400, "prompt: too long"),
        [text("a")],
        [text("a"), END],
        [text("a"), usage(1), DONE, END],
    ]
    async with opened(server.url, model="tiny") as target:
        run = await run_load(target, (LoadRequest([1], 1) for _ in range(6)), concurrency=1)
    kinds = [outcome.error for outcome in run.outcomes]
    assert kinds == ["resource_exhausted", "unavailable", "invalid_argument", "unavailable", "internal", None]
    assert run.outcomes[0].error_message == "HTTP 429: the queue is full"


async def test_a_follow_up_needs_token_ids(server: SseServer) -> None:
    request = LoadRequest([1], 1, follow_ups=(Turn([2], 1),))
    server.answers += [[text("a", token_ids=[5]), usage(1), DONE, END], [text("a"), usage(1), DONE, END]]
    async with opened(server.url, model="tiny") as target:
        assert (await send(target, request)).token_ids == [5]
        assert server.requests[0][2]["return_token_ids"] is True
        with pytest.raises(InvalidRequestError, match=r"0 ids of 1 tokens; use --api chat"):
            await send(target, request)


async def test_a_model_must_be_named_where_there_are_several(server: SseServer) -> None:
    server.models = {"data": [{"id": "a"}, {"id": "b", "max_model_len": 9}]}
    async with opened(server.url) as target:
        with pytest.raises(InvalidRequestError, match="--model: must name one of those served: a, b"):
            await target.served_model()
    async with opened(server.url, model="b") as target:
        assert await target.served_model() == ServedModel("b", max_model_len=9)
    server.models = {"hello": "world"}
    async with opened(server.url) as target:
        with pytest.raises(InternalError, match="is no list of models"):
            await target.served_model()


@pytest.mark.parametrize("scheme", ["http", "grpc"])
async def test_a_server_that_is_not_there_is_told_at_once(scheme: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        async with opened(f"{scheme}://{address}") as target:
            with pytest.raises(UnavailableError, match=rf"{address}.* cannot be reached: "):
                await target.served_model()


@pytest.mark.parametrize("address", ["ftp://a:1", "grpc://a", "localhost", "a:b"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match=f"^{address}: "):
        open_target(address)


def test_http_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "bench.load.http_target", raising=False)
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(ValueError, match=r"http needs aiohttp: .* 'baton\[bench\]'"):
        open_target("http://127.0.0.1:1")


def test_grpc_has_no_chats() -> None:
    with pytest.raises(ValueError, match="gRPC has no chat API"):
        open_target("127.0.0.1:1", api="chat")


@pytest.mark.parametrize("protocol", ["http", "grpc"])
async def test_batons_router_through_both_protocols(router: RouterServer, protocol: str) -> None:
    async with opened(router.url if protocol == "http" else f"grpc://{router.grpc_address}") as target:
        model = await target.served_model()
        assert (model.name, model.max_model_len) == ("model", 512)
        assert model.vocab_size == (1158 if protocol == "grpc" else None)
        conversation = LoadRequest([100, 101, 102], 4, follow_ups=(Turn([103], 2),))
        requests = [LoadRequest([100], 3, arrival_s=0.0), LoadRequest([101], 5, arrival_s=0.01), conversation]
        run = await run_load(target, requests, concurrency=3)
    assert [outcome.error for outcome in run.outcomes] == [None] * 4
    assert sorted(sum(outcome.token_counts) for outcome in run.outcomes) == [2, 3, 4, 5]
    assert all(sum(outcome.token_counts) == outcome.completion_tokens for outcome in run.outcomes)
    last = run.outcomes[-1]
    # The mock workers say 40, 41, 42, ...
    assert last.request.prompt == [100, 101, 102, 40, 41, 42, 43, 103]
    assert (last.prompt_tokens, last.cached_tokens) == (8, 0)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
async def test_what_the_router_refuses_has_the_same_kind_over_both(router: RouterServer, protocol: str) -> None:
    async with opened(router.url if protocol == "http" else f"grpc://{router.grpc_address}") as target:
        await target.served_model()
        run = await run_load(target, [LoadRequest([5000], 1)], concurrency=1)
    assert run.outcomes[0].error == "invalid_argument"
    assert "5000 is not below the vocabulary's 1158" in run.outcomes[0].error_message


@pytest.mark.parametrize("protocol", ["http", "grpc"])
async def test_keys_are_sent_over_both_protocols(protocol: str) -> None:
    config = ServeConfig(model=ModelConfig(path=str(MODEL)), router=RouterConfig(api_keys=("key-1",)))
    with running_router(config) as router:
        address = router.url if protocol == "http" else router.grpc_address
        async with opened(address) as target:
            with pytest.raises(BatonError) as caught:
                await target.served_model()
            assert caught.value.status == "UNAUTHENTICATED"
        async with opened(address, api_key="key-1") as target:
            await target.served_model()
            assert (await send(target, LoadRequest([100], 2))).completion_tokens == 2
