from __future__ import annotations

import math
from typing import Any

import pytest

from baton.config import RouterConfig
from baton.errors import InvalidRequestError, ModelNotFoundError
from baton.requests import Grammar, GrammarKind, SamplingParams
from baton.v1 import inference_pb2
from router.model_card import ModelCard, SamplingDefaults
from router.validation import Limits, check_envelope, check_prompt, resolve_sampling
from tests.router.conftest import request_of

CARD = ModelCard(name="mock", architecture="Mock", vocab_size=300, eos_token_ids=(1, 2))
LIMITS = Limits(vocab_size=300, max_model_len=512, max_sequence_tokens=400, block_size=16)
CONFIG = RouterConfig(
    max_n=4,
    max_logprobs=5,
    max_stop_strings=2,
    max_stop_string_chars=8,
    max_logit_bias=3,
    max_grammar_bytes=64,
    max_prompt_logprob_values=300,
)


def resolve(num_prompt_tokens: int = 100, card: ModelCard = CARD, **fields: Any) -> SamplingParams:
    return resolve_sampling(
        inference_pb2.SamplingParams(**fields),
        num_prompt_tokens=num_prompt_tokens,
        card=card,
        limits=LIMITS,
        config=CONFIG,
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.1}, "sampling.temperature: must be finite and at least 0, got -0.1"),
        ({"temperature": math.nan}, "sampling.temperature: must be finite and at least 0, got nan"),
        ({"temperature": math.inf}, "sampling.temperature: must be finite and at least 0, got inf"),
        ({"top_p": 0.0}, "sampling.top_p: must be above 0 and at most 1, got 0"),
        ({"top_p": 1.5}, "sampling.top_p: must be above 0 and at most 1, got 1.5"),
        ({"top_p": math.nan}, "sampling.top_p: must be above 0 and at most 1, got nan"),
        ({"min_p": -0.5}, "sampling.min_p: must be from 0 to 1, got -0.5"),
        ({"min_p": 1.5}, "sampling.min_p: must be from 0 to 1, got 1.5"),
        ({"presence_penalty": 2.5}, "sampling.presence_penalty: must be from -2 to 2, got 2.5"),
        ({"frequency_penalty": -3.0}, "sampling.frequency_penalty: must be from -2 to 2, got -3"),
        ({"frequency_penalty": math.nan}, "sampling.frequency_penalty: must be from -2 to 2, got nan"),
        ({"repetition_penalty": 0.0}, "sampling.repetition_penalty: must be finite and above 0, got 0"),
        ({"repetition_penalty": math.inf}, "sampling.repetition_penalty: must be finite and above 0, got inf"),
        ({"n": 0}, "sampling.n: must be from 1 to 4, got 0"),
        ({"n": 5}, "sampling.n: must be from 1 to 4, got 5"),
        ({"stop": ["a", "b", "c"]}, "sampling.stop: has 3 strings; at most 2 are allowed"),
        ({"stop": [""]}, "sampling.stop: strings must have 1 to 8 characters, got 0"),
        ({"stop": ["123456789"]}, "sampling.stop: strings must have 1 to 8 characters, got 9"),
        ({"stop_token_ids": [300]}, "sampling.stop_token_ids: 300 is not below the vocabulary's 300"),
        ({"stop_token_ids": [5] * 1025}, "sampling.stop_token_ids: has 1025 ids; at most 1024 are allowed"),
        ({"logit_bias": {300: 1.0}}, "sampling.logit_bias: 300 is not below the vocabulary's 300"),
        ({"logit_bias": {3: 101.0}}, "sampling.logit_bias: must be from -100 to 100, got 101"),
        ({"logit_bias": {3: math.nan}}, "sampling.logit_bias: must be from -100 to 100, got nan"),
        ({"logit_bias": dict.fromkeys(range(4), 1.0)}, "sampling.logit_bias: has 4 tokens; at most 3 are allowed"),
        ({"logprobs": 6}, "sampling.logprobs: must be at most 5, got 6"),
        ({"prompt_logprobs": 6}, "sampling.prompt_logprobs: must be at most 5, got 6"),
        (
            {"prompt_logprobs": 3},
            "sampling.prompt_logprobs: 100 prompt tokens x (3 + 1) are 400 logprobs; at most 300 are allowed",
        ),
        (
            {"grammar": inference_pb2.Grammar()},
            "sampling.grammar: needs one of json_schema, json_object, regex, choice, lark",
        ),
        (
            {"grammar": inference_pb2.Grammar(regex="é" * 33)},
            "sampling.grammar: has 66 bytes; at most 64 are allowed",
        ),
        ({"max_tokens": 0}, "sampling.max_tokens: must be at least 1, or 0 with echo or prompt_logprobs, got 0"),
        ({"max_tokens": 413}, "sampling.max_tokens: 413 and the prompt's 100 tokens exceed max_model_len 512"),
        (
            {"max_tokens": 301},
            "sampling.max_tokens: 301 and the prompt's 100 tokens with n 1 exceed what a decode worker holds, "
            "400 tokens",
        ),
        ({"max_tokens": 5, "min_tokens": 6}, "sampling.min_tokens: must be at most max_tokens 5, got 6"),
    ],
)
def test_a_breach_names_the_field_and_the_limit(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        resolve(**fields)
    assert caught.value.message == message
    assert caught.value.status == "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.0, "n": 4},
        {"top_p": 1.0, "min_p": 1.0, "top_k": 0},
        {"presence_penalty": -2.0, "frequency_penalty": 2.0, "repetition_penalty": 0.01},
        {"stop": ["12345678", "x"], "stop_token_ids": [299]},
        {"logit_bias": {299: -100.0, 0: 100.0}},
        {"logprobs": 0},
        {"logprobs": 5},
        {"max_tokens": 300, "min_tokens": 300},
    ],
)
def test_limits_themselves_are_allowed(fields: dict[str, Any]) -> None:
    resolve(**fields)


def test_defaults_are_the_request_s_then_the_model_s_then_the_api_s() -> None:
    card = ModelCard(
        name="mock",
        architecture="Mock",
        vocab_size=300,
        eos_token_ids=(1, 2),
        sampling=SamplingDefaults(temperature=0.6, top_k=20),
    )
    params = resolve(card=card, temperature=0.0)
    assert (params.temperature, params.top_k, params.top_p) == (0.0, 20, 1.0)
    assert params.eos_token_ids == (1, 2)
    assert params.logprobs is None
    assert params.n == 1


def test_ignore_eos_leaves_no_eos_ids() -> None:
    assert resolve(ignore_eos=True).eos_token_ids == ()


@pytest.mark.parametrize("fields", [{"echo": True}, {"prompt_logprobs": 0}])
def test_nothing_need_be_generated_where_the_prompt_is_wanted(fields: dict[str, Any]) -> None:
    assert resolve(max_tokens=0, **fields).max_tokens == 0


@pytest.mark.parametrize(
    ("wire", "grammar"),
    [
        ({"json_schema": "{}"}, Grammar(GrammarKind.JSON_SCHEMA, ("{}",))),
        ({"json_object": True}, Grammar(GrammarKind.JSON_OBJECT)),
        ({"json_object": False}, None),
        ({"regex": "a"}, Grammar(GrammarKind.REGEX, ("a",))),
        ({"choice": inference_pb2.Alternatives(texts=["a", "b"])}, Grammar(GrammarKind.CHOICE, ("a", "b"))),
        ({"lark": "start: A"}, Grammar(GrammarKind.LARK, ("start: A",))),
    ],
)
def test_grammars_of_every_kind_are_kept(wire: dict[str, Any], grammar: Grammar | None) -> None:
    assert resolve(grammar=inference_pb2.Grammar(**wire)).grammar == grammar


def test_a_seed_is_kept_and_else_drawn() -> None:
    assert resolve(seed=0).seed == 0
    assert resolve().seed != resolve().seed


def test_max_tokens_unset_is_the_rest_of_the_model_s_length_or_of_the_pool() -> None:
    assert resolve(num_prompt_tokens=100).max_tokens == 300
    roomy = Limits(vocab_size=300, max_model_len=512, max_sequence_tokens=4000)
    params = resolve_sampling(
        inference_pb2.SamplingParams(), num_prompt_tokens=100, card=CARD, limits=roomy, config=CONFIG
    )
    assert params.max_tokens == 412


def test_choices_share_only_the_full_blocks_of_the_prompt() -> None:
    # 96 of 100 tokens are shared; 304 tokens are 19 blocks, 4 for each of 4 choices, 4 tokens of them the prompt's.
    assert resolve(num_prompt_tokens=100, n=4).max_tokens == 4 * 16 - 4
    with pytest.raises(InvalidRequestError, match="with n 4"):
        resolve(num_prompt_tokens=100, n=4, max_tokens=61)


def test_a_prompt_that_fits_no_decode_worker_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"prompt: has 400 tokens; .* which holds 400"):
        resolve(num_prompt_tokens=400)


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ([], "prompt: must have at least one token"),
        ([5] * 512, "prompt: has 512 tokens; the model takes at most 511 (max_model_len 512, one of them generated)"),
        ([5, 300], "token_ids: 300 is not below the vocabulary's 300"),
    ],
)
def test_prompts(token_ids: list[int], message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_prompt(token_ids, LIMITS)
    assert caught.value.message == message


def test_the_longest_prompt_is_allowed() -> None:
    check_prompt([299] * 511, LIMITS)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (request_of(cache_salt="x" * 257), "cache_salt: has 257 characters; at most 256 are allowed"),
        (inference_pb2.GenerateRequest(), "prompt: either text or token_ids is required"),
    ],
)
def test_envelopes(request_: inference_pb2.GenerateRequest, message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_envelope(request_, CARD)
    assert caught.value.message == message


def test_another_model_is_not_found() -> None:
    with pytest.raises(ModelNotFoundError, match="'gpt' is not served; this is 'mock'"):
        check_envelope(request_of(model="gpt"), CARD)
    check_envelope(request_of(model="mock"), CARD)
    check_envelope(request_of(model=""), CARD)
