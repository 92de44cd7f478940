"""Grammars, prompt logprobs and choices that end early, through a router and real workers over real sockets."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from baton.client import Client
from baton.config import CacheConfig, DecodeConfig, RouterConfig
from baton.errors import InvalidRequestError
from baton.requests import FinishReason
from tests.cluster.harness import ClusterUnderTest
from tests.cluster.inprocess import assert_idle, in_process_cluster
from tests.cluster.oracle import prompt_of
from tests.engine.checkpoints import make_checkpoint
from tests.engine.test_prompt_logprobs import assert_equal, expected

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 10}, "leg": {"enum": [1, 2, 3, 4]}},
    "required": ["name", "leg"],
    "additionalProperties": False,
}
SHORT, LONG = "Write JSON:", "Once upon a time there was a runner who wrote JSON. " * 8


class TestProcesses:
    """The demo model, where a short prompt is prefilled by the decode worker and a long one is not."""

    @pytest.fixture
    def client(self, demo_cluster: ClusterUnderTest) -> Iterator[Client]:
        with Client(demo_cluster.target) as client:
            yield client
            assert_idle(client)

    @pytest.mark.parametrize("prompt", [SHORT, LONG])
    def test_every_choice_matches_the_schema(self, client: Client, prompt: str) -> None:
        completion = client.generate(prompt, json_schema=SCHEMA, n=3, temperature=1.0, seed=5, max_tokens=400)
        assert completion.timings.local_prefill == (prompt == SHORT)
        for choice in completion.choices:
            jsonschema.validate(json.loads(choice.text), SCHEMA)
            assert choice.finish_reason is FinishReason.STOP

    def test_grammars_of_every_kind(self, client: Client) -> None:
        assert client.generate(SHORT, choice=["yes", "no"], max_tokens=9).text in ("yes", "no")
        assert client.generate(SHORT, regex="[0-9]{4}", max_tokens=9).text.isdigit()
        assert client.generate(SHORT, grammar='start: "a" "b"', max_tokens=9).text == "ab"
        assert client.generate(SHORT, json_object=True, max_tokens=9).text.startswith("{")

    def test_a_grammar_that_is_wrong_is_refused_by_name(self, client: Client) -> None:
        with pytest.raises(InvalidRequestError, match=r"^sampling.grammar.regex: .*unclosed group"):
            client.generate(SHORT, regex="(a", max_tokens=9)

    def test_a_prompt_is_scored_without_generating(self, client: Client) -> None:
        completion = client.generate(LONG, prompt_logprobs=2, max_tokens=0)
        assert completion.prompt is not None
        assert completion.prompt.text == LONG
        assert len(completion.prompt.logprobs) == len(completion.prompt.token_ids) - 1
        assert [(choice.text, choice.finish_reason) for choice in completion.choices] == [("", FinishReason.LENGTH)]
        assert completion.usage.completion_tokens == 0

    def test_a_stop_string_and_special_tokens_are_sent_if_asked_for(self, client: Client) -> None:
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


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_scores_equal_transformers_whoever_computes_them(family: str, tmp_path: pathlib.Path) -> None:
    model = make_checkpoint(family, tmp_path / family)
    prompts = [prompt_of(150, 1), prompt_of(20, 2)]
    with in_process_cluster(model, decode=DecodeConfig(local_prefill_tokens=32)) as client:
        for prompt in prompts:
            plain = client.generate(prompt, max_tokens=4, temperature=0.0)
            # Now all of it is cached everywhere.
            completion = client.generate(prompt, max_tokens=4, temperature=0.0, prompt_logprobs=3)
            assert completion.prompt is not None
            assert_equal(list(completion.prompt.logprobs), prompt, expected(model, prompt), 3)
            assert completion.choices == plain.choices
            assert completion.timings.local_prefill == (len(prompt) == 20)
            assert completion.usage.cached_tokens == 0


def test_a_prompt_whose_scores_would_not_fit_a_message_is_refused(tmp_path: pathlib.Path) -> None:
    model = make_checkpoint("llama", tmp_path / "llama")
    router = RouterConfig(grpc_port=0, http_port=0, max_prompt_logprob_values=100)
    with in_process_cluster(model, router=router) as client:
        with pytest.raises(InvalidRequestError, match=r"40 prompt tokens x \(2 \+ 1\) are 120 .* at most 100"):
            client.generate(prompt_of(40), max_tokens=0, prompt_logprobs=2)
        assert client.generate(prompt_of(40), max_tokens=0, prompt_logprobs=1).usage.prompt_tokens == 40


def test_a_choice_that_a_stop_string_ends_frees_its_blocks_while_the_others_go_on(tmp_path: pathlib.Path) -> None:
    model = make_checkpoint("llama", tmp_path / "llama")
    options: dict[str, Any] = {"n": 2, "temperature": 1.0, "seed": 3, "ignore_eos": True}
    decode = DecodeConfig(local_prefill_tokens=0, max_unacked_tokens=4)
    with in_process_cluster(model, decode=decode, cache=CacheConfig(kv_cache_bytes=16 << 20)) as client:
        texts = [choice.text for choice in client.generate(prompt_of(40), max_tokens=30, **options).choices]
        stop = texts[0][4:12]
        assert stop not in texts[1]
        stream = client.stream(prompt_of(40), max_tokens=900, stop=stop, **options)
        for delta in stream:
            if any(choice.index == 0 and choice.matched_stop for choice in delta.choices):
                break
        while (running := next(w.running for w in client.status().workers if w.role == "decode")) > 1:
            pass
        # The other one: it goes on, and at its end nothing is running.
        assert running == 1
        rest = [choice for delta in stream for choice in delta.choices]
        assert {choice.index for choice in rest} == {1}
