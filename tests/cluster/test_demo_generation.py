"""Grammars, scores and stops on the demo model, where a short prompt is prefilled by the decode worker and a long one
is not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from baton.client import Client
from baton.errors import InvalidRequestError
from baton.requests import FinishReason
from tests.cluster.harness import ClusterUnderTest
from tests.cluster.inprocess import assert_idle

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 10}, "leg": {"enum": [1, 2, 3, 4]}},
    "required": ["name", "leg"],
    "additionalProperties": False,
}
SHORT, LONG = "Write JSON:", "Once upon a time there was a runner who wrote JSON. " * 8


@pytest.fixture
def client(demo_cluster: ClusterUnderTest) -> Iterator[Client]:
    with Client(demo_cluster.target) as client:
        yield client
        assert_idle(client)


@pytest.mark.parametrize("prompt", [SHORT, LONG])
def test_every_choice_matches_the_schema(client: Client, prompt: str) -> None:
    completion = client.generate(prompt, json_schema=SCHEMA, n=3, temperature=1.0, seed=5, max_tokens=400)
    assert completion.timings.local_prefill == (prompt == SHORT)
    for choice in completion.choices:
        jsonschema.validate(json.loads(choice.text), SCHEMA)
        assert choice.finish_reason is FinishReason.STOP


def test_grammars_of_every_kind(client: Client) -> None:
    assert client.generate(SHORT, choice=["yes", "no"], max_tokens=9).text in ("yes", "no")
    assert client.generate(SHORT, regex="[0-9]{4}", max_tokens=9).text.isdigit()
    assert client.generate(SHORT, grammar='start: "a" "b"', max_tokens=9).text == "ab"
    assert client.generate(SHORT, json_object=True, max_tokens=9).text.startswith("{")


def test_a_grammar_that_is_wrong_is_refused_by_name(client: Client) -> None:
    with pytest.raises(InvalidRequestError, match=r"^sampling.grammar.regex: .*unclosed group"):
        client.generate(SHORT, regex="(a", max_tokens=9)


def test_a_prompt_is_scored_without_generating(client: Client) -> None:
    completion = client.generate(LONG, prompt_logprobs=2, max_tokens=0)
    assert completion.prompt is not None
    assert completion.prompt.text == LONG
    assert len(completion.prompt.logprobs) == len(completion.prompt.token_ids) - 1
    assert [(choice.text, choice.finish_reason) for choice in completion.choices] == [("", FinishReason.LENGTH)]
    assert completion.usage.completion_tokens == 0


def test_a_stop_string_and_special_tokens_are_sent_if_asked_for(client: Client) -> None:
    options: dict[str, Any] = {"max_tokens": 20, "temperature": 0.0, "ignore_eos": True}
    whole = client.generate("Once upon", **options).text
    stop = whole[6:9]
    end = whole.index(stop)
    assert client.generate("Once upon", **options, stop=stop).text == whole[:end]
    assert client.generate("Once upon", **options, stop=stop, include_stop=True).text == whole[: end + 3]
    bos = client.tokenize("")[0]
    shown = client.generate(LONG, max_tokens=2, skip_special_tokens=False, logit_bias={bos: 100.0}).text
    assert shown == client.detokenize([bos, bos])
    assert client.generate(LONG, max_tokens=2, logit_bias={bos: 100.0}).text == ""
