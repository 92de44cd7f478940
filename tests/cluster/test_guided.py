"""Guided decoding on every way through the workers, driven step by step: both legs, choices, replay, preemption."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from tokenizers import Tokenizer

from baton.config import DecodeConfig
from baton.errors import InvalidRequestError
from baton.internal.v1 import worker_pb2
from baton.requests import Delivered, FinishReason, Grammar, GrammarKind, RequestSpec
from baton.wire import ref_to_wire
from tests.cluster.oracle import prompt_of
from tests.composed import Pair
from tests.engine.checkpoints import EOS_ID, make_checkpoint

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 999},
        "kind": {"enum": ["sprint", "relay"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
JSON = Grammar(GrammarKind.JSON_SCHEMA, (json.dumps(SCHEMA),))
WORDS = Grammar(GrammarKind.REGEX, (r"([a-z]{3,5} ){12}",))
SEEDED: dict[str, Any] = {"temperature": 1.0, "seed": 4, "max_tokens": 200, "eos_token_ids": (EOS_ID,)}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def tokenizer(llama: pathlib.Path) -> Tokenizer:
    return Tokenizer.from_file(str(llama / "tokenizer.json"))


@pytest.fixture(scope="module")
def sides(llama: pathlib.Path) -> Iterator[Pair]:
    made = Pair(llama)
    yield made
    made.close()


@pytest.fixture
def pair(sides: Pair) -> Iterator[Pair]:
    """Both workers; after each test both pools must be empty."""
    yield sides
    sides.run()
    sides.assert_empty()


def run(pair: Pair, *, local: bool = False, **sampling: Any) -> RequestSpec:
    spec = pair.start(pair.spec(prompt_of(40), **{**SEEDED, **sampling}), local_prefill=local)
    pair.run()
    return spec


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_text_matches_the_schema_whoever_prefills(
    pair: Pair, tokenizer: Tokenizer, local: bool, temperature: float
) -> None:
    spec = run(pair, local=local, grammar=JSON, temperature=temperature)
    jsonschema.validate(json.loads(tokenizer.decode(pair.tokens(spec))), SCHEMA)
    assert pair.outbox.tokens[-1].finish_reason is FinishReason.STOP


@pytest.mark.parametrize("local", [False, True])
def test_each_choice_follows_the_grammar_on_a_way_of_its_own(pair: Pair, tokenizer: Tokenizer, local: bool) -> None:
    spec = run(pair, local=local, grammar=JSON, n=3)
    texts = {tokenizer.decode(pair.tokens(spec, choice)) for choice in range(3)}
    assert len(texts) == 3
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)


def test_a_first_token_that_completes_the_text_ends_the_choice_at_the_prefill_worker(pair: Pair) -> None:
    spec = run(pair, grammar=Grammar(GrammarKind.REGEX, ("[a-z]",)), eos_token_ids=(), min_tokens=9)
    (token,) = pair.first_tokens(spec)
    assert token.finish_reason is FinishReason.STOP
    assert pair.outbox.states(spec.ref) == []


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("num_delivered", [1, 9, 20])
def test_a_replay_goes_on_in_the_grammar_where_the_client_stands(pair: Pair, local: bool, num_delivered: int) -> None:
    whole = pair.tokens(run(pair, grammar=WORDS))
    delivered = [Delivered(tuple(whole[:num_delivered]))]
    replay = pair.spec(prompt_of(40), attempt=2, delivered=delivered, **SEEDED, grammar=WORDS)
    pair.start(replay, local_prefill=local)
    pair.run()
    assert pair.tokens(replay) == whole


def test_choices_are_replayed_each_in_its_own_place_of_the_grammar(pair: Pair) -> None:
    spec = run(pair, grammar=WORDS, n=3)
    whole = [pair.tokens(spec, choice) for choice in range(3)]
    delivered = [Delivered(tuple(whole[0][:7])), Delivered(()), Delivered(tuple(whole[2]), finished=True)]
    replay = pair.start(pair.spec(prompt_of(40), attempt=2, delivered=delivered, **SEEDED, grammar=WORDS, n=3))
    pair.run()
    assert [pair.tokens(replay, choice) for choice in range(3)] == whole


def test_a_preempted_request_ends_with_the_text_that_it_would_have_had(
    pair: Pair, llama: pathlib.Path, tokenizer: Tokenizer
) -> None:
    wanted = [pair.tokens(run(pair, grammar=WORDS, seed=seed)) for seed in range(2)]
    # Both prompts fit, and not both answers.
    small = Pair(llama, decode_blocks=8, decode=DecodeConfig(watermark=0.0))
    sampling = {**SEEDED, "max_tokens": 70, "grammar": WORDS}
    older, newer = (small.start(small.spec(prompt_of(40), **{**sampling, "seed": seed})) for seed in range(2))
    small.run()
    assert small.tokens(older) == wanted[0]
    assert small.outbox.states(newer.ref) == ["DECODING", "PREEMPTED"]
    delivered = [Delivered(tuple(small.tokens(newer)))]
    again = small.spec(prompt_of(40), attempt=2, delivered=delivered, **{**sampling, "seed": 1})
    small.start(again)
    small.run()
    assert small.tokens(again) == wanted[1]
    assert re.fullmatch(WORDS.texts[0], tokenizer.decode(small.tokens(again)))
    small.assert_empty()
    small.close()


@pytest.mark.parametrize("local", [False, True])
def test_a_grammar_that_fails_ends_its_own_request_only(pair: Pair, local: bool) -> None:
    plain = pair.tokens(run(pair, max_tokens=12))
    # What is forced does not match: the guide cannot follow it.
    broken = pair.spec(
        prompt_of(40), attempt=2, delivered=[Delivered((EOS_ID, EOS_ID, EOS_ID))], **SEEDED, grammar=WORDS
    )
    pair.start(broken, local_prefill=local)
    sound = pair.start(pair.spec(prompt_of(40), **{**SEEDED, "max_tokens": 12}), local_prefill=local)
    pair.run()
    assert pair.tokens(sound) == plain
    if local:
        (failed,) = [update for update in pair.outbox.updates if update.ref == ref_to_wire(broken.ref)]
        assert failed.state == worker_pb2.REQUEST_STATE_FAILED
        assert (failed.status, failed.message[:17]) == ("INVALID_ARGUMENT", "sampling.grammar:")
    else:
        assert isinstance(pair.error(broken), InvalidRequestError)
        pair.decode.cancel(broken.ref)
