"""Prompt logprobs and choices that end early, through a router and real workers over real sockets."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

from baton.config import CacheConfig, DecodeConfig, RouterConfig
from baton.errors import InvalidRequestError
from tests.cluster.inprocess import in_process_cluster
from tests.cluster.oracle import prompt_of
from tests.engine.checkpoints import make_checkpoint
from tests.engine.test_prompt_logprobs import assert_equal, expected


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
        stream = client.stream(prompt_of(40), max_tokens=300, stop=stop, **options)
        for delta in stream:
            if any(choice.index == 0 and choice.matched_stop for choice in delta.choices):
                break
        while (running := next(w.running for w in client.status().workers if w.role == "decode")) > 1:
            pass
        # The other one: it goes on, and at its end nothing is running.
        assert running == 1
        rest = [choice for delta in stream for choice in delta.choices]
        assert {choice.index for choice in rest} == {1}
