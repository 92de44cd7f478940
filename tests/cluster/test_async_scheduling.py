"""A decode worker that launches a step before it has looked at the last one says what it says otherwise."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import pytest

from baton.config import DecodeConfig
from baton.requests import RequestSpec, Token
from tests.cluster.oracle import prompt_of
from tests.composed import Pair

# In a vocabulary as small as the tests', some of these come soon.
ENDINGS = tuple(range(0, 256, 9))
KINDS: list[dict[str, Any]] = [
    {"max_tokens": 20},
    {"max_tokens": 1},
    {"max_tokens": 2, "temperature": 1.0, "seed": 5},
    {"max_tokens": 40, "temperature": 1.0, "seed": 1, "stop_token_ids": ENDINGS},
    {"max_tokens": 40, "temperature": 1.5, "seed": 2, "stop_token_ids": ENDINGS, "min_tokens": 12},
    {"max_tokens": 30, "temperature": 0.8, "seed": 3, "n": 3, "top_k": 20, "stop_token_ids": ENDINGS},
    {"max_tokens": 15, "temperature": 1.0, "seed": 4, "logprobs": 3, "logit_bias": {7: 4.0}},
    {"max_tokens": 12, "prompt_logprobs": 1, "top_p": 0.5, "temperature": 1.0, "seed": 6},
]
LOOKING_BACK = {"max_tokens": 18, "presence_penalty": 1.5, "repetition_penalty": 1.3}


@pytest.fixture(scope="module")
def pairs(llama: pathlib.Path) -> Iterator[tuple[Pair, Pair]]:
    """Steps of the first overlap."""
    overlapping, one_by_one = (
        Pair(llama, decode=DecodeConfig(prefill_chunk_tokens=9, async_scheduling=mode)) for mode in ("on", "off")
    )
    yield overlapping, one_by_one
    for pair in (overlapping, one_by_one):
        pair.close()


def answers(pair: Pair, kinds: list[dict[str, Any]]) -> list[list[Token]]:
    """All tokens of requests that run side by side, some prefilled by the decode worker itself."""
    specs: list[RequestSpec] = []
    for index, kind in enumerate(kinds):
        specs.append(pair.start(pair.spec(prompt_of(5 + 7 * index, index), **kind), local_prefill=index % 3 != 0))
        pair.step_prefill()
        pair.step_decode()
    pair.run()
    pair.assert_empty()
    told = [
        sorted(
            (token for token in [*pair.first_tokens(spec), *pair.outbox.tokens] if token.ref == spec.ref),
            key=lambda token: (token.choice, token.position),
        )
        for spec in specs
    ]
    for spec in specs:
        for choice in range(spec.sampling.n):
            assert len(pair.tokens(spec, choice)) <= spec.sampling.max_tokens
    return told


def without_names(tokens: list[list[Token]]) -> list[list[tuple[Any, ...]]]:
    return [
        [(token.choice, token.position, token.token_id, token.logprobs, token.finish_reason) for token in of_request]
        for of_request in tokens
    ]


@pytest.mark.parametrize("kinds", [KINDS, [*KINDS, LOOKING_BACK]], ids=["overlapping", "looking back"])
def test_tokens_logprobs_and_ends_are_those_of_steps_one_by_one(
    pairs: tuple[Pair, Pair], kinds: list[dict[str, Any]]
) -> None:
    overlapping, one_by_one = pairs
    assert without_names(answers(overlapping, kinds)) == without_names(answers(one_by_one, kinds))


def test_a_step_is_launched_before_the_last_one_is_told(pairs: tuple[Pair, Pair]) -> None:
    overlapping, _ = pairs
    spec = overlapping.start(overlapping.spec(prompt_of(6, 1), max_tokens=5), local_prefill=True)
    told = []
    while not overlapping.decode.is_idle:
        overlapping.step_decode()
        told.append(len(overlapping.tokens(spec)))
    # The prompt's step and each choice's first are followed by one that tells nothing.
    assert told == [0, 1, 1, 2, 3, 4, 5]


def test_a_step_whose_logits_are_scored_is_not_followed(pairs: tuple[Pair, Pair]) -> None:
    """Its logits are neither held beside another step's nor overwritten with them."""
    overlapping, _ = pairs
    spec = overlapping.start(overlapping.spec(prompt_of(20, 3), max_tokens=2, prompt_logprobs=0), local_prefill=True)
    scored = []
    while not overlapping.decode.is_idle:
        overlapping.step_decode()
        scored.append(len(overlapping.prompt_logprobs(spec)))
    assert scored[:3] == [9, 18, 19]


def test_what_is_cancelled_in_flight_is_told_no_more(pairs: tuple[Pair, Pair]) -> None:
    """Its blocks go back at once: who gets them next waits for the step that may still write them."""
    overlapping, _ = pairs
    kept, dropped = (
        overlapping.start(overlapping.spec(prompt_of(6, index), max_tokens=30), local_prefill=True) for index in (1, 2)
    )
    for _ in range(8):
        overlapping.step_decode()
    num_told = len(overlapping.tokens(dropped))
    assert num_told > 1
    overlapping.decode.cancel(dropped.ref)
    overlapping.run()
    assert len(overlapping.tokens(dropped)) == num_told
    assert len(overlapping.tokens(kept)) == 30
    overlapping.assert_empty()


def test_a_failed_step_ends_those_of_both_that_were_launched(
    pairs: tuple[Pair, Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    overlapping, _ = pairs
    first = overlapping.start(overlapping.spec(prompt_of(6, 1), max_tokens=30), local_prefill=True)
    for _ in range(4):
        overlapping.step_decode()
    with monkeypatch.context() as patch:
        patch.setattr("engine.model_runner.ModelRunner.execute_batch", None)
        with pytest.raises(TypeError) as failure:
            overlapping.step_decode()
        overlapping.decode.fail(failure.value)
    overlapping.assert_empty()
    assert overlapping.outbox.states(first.ref)[-1] == "FAILED"
    again = overlapping.start(overlapping.spec(prompt_of(6, 1), max_tokens=4), local_prefill=True)
    overlapping.run()
    assert len(overlapping.tokens(again)) == 4
