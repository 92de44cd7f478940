"""Prompt logprobs on every way through the workers, driven step by step: both legs, full caches, replay, preemption."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest

from baton.config import DecodeConfig, PrefillConfig
from baton.internal.v1 import worker_pb2
from tests.cluster.oracle import prompt_of
from tests.composed import Pair
from tests.engine.checkpoints import make_checkpoint
from tests.engine.test_prompt_logprobs import assert_equal, expected


@pytest.fixture(scope="module", params=[("llama", 8), ("gemma3", 16)], ids=str)
def sides(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Pair, pathlib.Path]]:
    """Workers whose chunks end within blocks, and their model."""
    family, block_size = request.param
    model = make_checkpoint(family, tmp_path_factory.mktemp("models") / family)
    made = Pair(
        model,
        block_size=block_size,
        prefill=PrefillConfig(max_batch_tokens=37),
        decode=DecodeConfig(prefill_chunk_tokens=11),
    )
    yield made, model
    made.close()


@pytest.fixture
def model(sides: tuple[Pair, pathlib.Path]) -> pathlib.Path:
    return sides[1]


@pytest.fixture
def pair(sides: tuple[Pair, pathlib.Path]) -> Iterator[Pair]:
    """The workers; after each test both pools must be empty."""
    yield sides[0]
    sides[0].run()
    sides[0].assert_empty()


def test_scores_are_exact_whoever_computes_them_and_whatever_is_cached(pair: Pair, model: pathlib.Path) -> None:
    prompt = prompt_of(80)
    logprobs = expected(model, prompt)
    plain = pair.start(pair.spec(prompt, max_tokens=6))
    pair.run()
    for local in (False, True, False):
        # From the second on the whole prompt lies in both caches.
        spec = pair.start(pair.spec(prompt, max_tokens=6, prompt_logprobs=4), local_prefill=local)
        pair.run()
        assert_equal(pair.prompt_logprobs(spec), prompt, logprobs, 4)
        assert pair.tokens(spec) == pair.tokens(plain)
        if not local:
            started = pair.events[spec.ref][0]
            assert isinstance(started, worker_pb2.PrefillEvent)
            assert started.started.cached_tokens == 0


def test_scores_come_before_the_first_token_chunk_by_chunk(pair: Pair) -> None:
    spec = pair.start(pair.spec(prompt_of(80), max_tokens=1, prompt_logprobs=0))
    pair.run()
    kinds = [event.WhichOneof("event") for event in pair.events[spec.ref] if not isinstance(event, Exception)]
    assert kinds == ["started", "prompt_logprobs", "prompt_logprobs", "prompt_logprobs", "first_tokens", "done"]


def test_prompts_are_scored_beside_others_that_are_not(pair: Pair, model: pathlib.Path) -> None:
    prompts = [prompt_of(length, seed) for seed, length in enumerate([5, 1, 20, 33])]
    for local in (False, True):
        specs = [
            pair.start(
                pair.spec(prompt, max_tokens=4, prompt_logprobs=2 if index != 2 else None, n=1 + index % 2),
                local_prefill=local,
            )
            for index, prompt in enumerate(prompts)
        ]
        pair.run()
        for index, (spec, prompt) in enumerate(zip(specs, prompts, strict=True)):
            if index == 2:
                assert pair.prompt_logprobs(spec) == []
            else:
                assert_equal(pair.prompt_logprobs(spec), prompt, expected(model, prompt), 2)
            assert len(pair.tokens(spec)) == 4


@pytest.mark.parametrize("local", [False, True])
def test_a_new_attempt_scores_the_prompt_from_its_beginning(pair: Pair, model: pathlib.Path, local: bool) -> None:
    prompt = prompt_of(80, 9)
    first = pair.start(pair.spec(prompt, request_id=f"retried {local}", prompt_logprobs=1), local_prefill=local)
    for _ in range(2):
        pair.step_prefill()
        pair.step_decode()
    assert 0 < len(pair.prompt_logprobs(first)) < 79
    pair.prefill.cancel(first.ref)
    pair.decode.cancel(first.ref)
    pair.run()
    second = pair.spec(prompt, request_id=f"retried {local}", attempt=2, prompt_logprobs=1)
    pair.start(second, local_prefill=local)
    pair.run()
    assert_equal(pair.prompt_logprobs(second), prompt, expected(model, prompt), 1)
