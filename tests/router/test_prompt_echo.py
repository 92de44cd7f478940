"""Prompts that are scored or sent back, with or without anything generated, against mock workers."""

from __future__ import annotations

import grpc
import pytest

from baton.v1 import inference_pb2
from baton.wire import spec_from_wire
from bench.mock_workers.cluster import MockCluster
from tests.router.conftest import StartRouter, request_of, tokens_of

PROMPT = [0, *range(20, 59)]
SCORES = [float(-position) for position in range(1, 40)]


def scores_of(response: inference_pb2.GenerateResponse) -> list[float]:
    return [at.sampled.logprob for at in response.prompt.logprobs]


@pytest.mark.parametrize("local_prefill_tokens", [0, 100])
async def test_the_first_response_has_the_logprobs_of_the_prompt(
    start_router: StartRouter, local_prefill_tokens: int
) -> None:
    options = {"local_prefill_tokens": local_prefill_tokens}
    async with MockCluster() as cluster, start_router(cluster, decode=options) as client:
        responses = await client.generate(request_of(PROMPT, max_tokens=5, prompt_logprobs=0))
        assert scores_of(responses[0]) == SCORES
        assert list(responses[0].prompt.token_ids) == PROMPT
        assert not any(response.HasField("prompt") for response in responses[1:])
        assert tokens_of(responses) == [40, 41, 42, 43, 44]
        assert responses[-1].timings.local_prefill == bool(local_prefill_tokens)


@pytest.mark.parametrize("local_prefill_tokens", [0, 100])
async def test_a_prompt_is_scored_without_generating_anything(
    start_router: StartRouter, local_prefill_tokens: int
) -> None:
    options = {"local_prefill_tokens": local_prefill_tokens}
    async with MockCluster() as cluster, start_router(cluster, decode=options) as client:
        request = request_of(PROMPT, max_tokens=0, prompt_logprobs=0, n=2, temperature=1.0)
        (response,) = await client.generate(request)
        assert scores_of(response) == SCORES
        assert [(delta.index, list(delta.token_ids), delta.text) for delta in response.choices] == [
            (0, [], ""),
            (1, [], ""),
        ]
        assert {delta.finish_reason for delta in response.choices} == {inference_pb2.FINISH_REASON_LENGTH}
        assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (40, 0)
        decode = cluster.decode[0]
        sampling = spec_from_wire(decode.reserves[0].spec).sampling
        assert (sampling.max_tokens, sampling.n, sampling.temperature) == (1, 1, 0.0)
        # The token that nobody asked for is dropped at the worker too.
        await decode.until(lambda: (0, 1) in decode.cancelled)


async def test_a_prompt_that_is_only_sent_back_needs_no_worker(start_router: StartRouter) -> None:
    async with MockCluster() as cluster, start_router(cluster) as client:
        (response,) = await client.generate(request_of("hello world", max_tokens=0, echo=True, n=2))
        assert response.prompt.text == "hello world"
        assert len(response.choices) == 2
        assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (len(response.prompt.token_ids), 0)
        assert cluster.decode[0].reserves == []
        assert client.server.pipeline.num_running == 0


@pytest.mark.parametrize("max_inline_tokens", [4096, 0])
async def test_a_prompt_of_ids_reads_with_special_tokens_if_those_are_wanted(
    start_router: StartRouter, max_inline_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.intake._MAX_INLINE_TOKENS", max_inline_tokens)
    async with MockCluster() as cluster, start_router(cluster) as client:
        texts = []
        for skips in (True, False):
            request = request_of([0, 20, 21], max_tokens=0, echo=True, skip_special_tokens=skips)
            (response,) = await client.generate(request)
            texts.append(response.prompt.text)
        assert texts[1] == "<s>" + texts[0]


@pytest.mark.parametrize("num_events", [1, 2, 3])
async def test_a_retry_scores_anew_and_nothing_comes_twice(start_router: StartRouter, num_events: int) -> None:
    """The prefill worker dies before, amid or after the scores."""
    async with MockCluster(num_prefill=2) as cluster, start_router(cluster) as client:
        await client.until_connected(3)
        for prefill in cluster.prefill:
            prefill.failures = [(num_events, grpc.StatusCode.UNAVAILABLE)]
        responses = await client.generate(request_of(PROMPT, max_tokens=5, prompt_logprobs=0))
        assert scores_of(responses[0]) == SCORES
        assert responses[-1].timings.attempts == 3


async def test_a_retry_after_the_first_token_does_not_score_again(start_router: StartRouter) -> None:
    async with MockCluster() as cluster, start_router(cluster) as client:
        decode = cluster.decode[0]
        decode.step_gate.clear()
        stream = client.stream(request_of(PROMPT, max_tokens=5, prompt_logprobs=0))
        first = await stream.read()
        assert isinstance(first, inference_pb2.GenerateResponse)
        assert scores_of(first) == SCORES
        await decode.until(lambda: decode.reservations[0, 1].committed)
        decode.preempt((0, 1))
        decode.step_gate.set()
        rest = []
        while isinstance(response := await stream.read(), inference_pb2.GenerateResponse):
            rest.append(response)
        assert not any(response.HasField("prompt") for response in rest)
        assert tokens_of([first, *rest]) == [40, 41, 42, 43, 44]
        assert not decode.reserves[1].spec.sampling.HasField("prompt_logprobs")
