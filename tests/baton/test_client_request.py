"""Requests as the clients put them on the wire."""

from __future__ import annotations

from typing import Any

import pytest

from baton.client import GenerateOptions
from baton.client.request import build_request
from baton.errors import InvalidRequestError
from baton.v1 import inference_pb2


def test_text_and_token_ids_are_the_two_kinds_of_prompt() -> None:
    assert build_request("hello").text == "hello"
    assert list(build_request([5, 6, 7]).token_ids.ids) == [5, 6, 7]
    assert build_request([]).WhichOneof("prompt") == "token_ids"


def test_what_is_left_out_or_none_stays_unset_so_that_the_server_decides() -> None:
    request = build_request("hello", temperature=None, max_tokens=None)
    assert request == inference_pb2.GenerateRequest(text="hello", sampling=inference_pb2.SamplingParams())
    assert not request.sampling.HasField("temperature")


def test_zero_is_a_value_and_not_unset() -> None:
    sampling = build_request("hello", temperature=0.0, logprobs=0, seed=0).sampling
    assert sampling.HasField("temperature")
    assert sampling.HasField("logprobs")
    assert sampling.HasField("seed")


def test_every_option_reaches_its_field() -> None:
    request = build_request(
        "hello",
        max_tokens=5,
        temperature=0.5,
        top_p=0.75,
        top_k=3,
        min_p=0.25,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.5,
        seed=1 << 60,
        n=2,
        stop=["a", "b"],
        stop_token_ids=[7],
        ignore_eos=True,
        min_tokens=1,
        logit_bias={4: -1.5},
        logprobs=2,
        echo=True,
        prompt_logprobs=3,
        include_stop=True,
        skip_special_tokens=False,
        model="demo",
        priority=-3,
        cache_salt="tenant",
        request_id="r-1",
        timeout_s=2.0,
    )
    assert request == inference_pb2.GenerateRequest(
        text="hello",
        model="demo",
        priority=-3,
        cache_salt="tenant",
        request_id="r-1",
        sampling=inference_pb2.SamplingParams(
            max_tokens=5,
            temperature=0.5,
            top_p=0.75,
            top_k=3,
            min_p=0.25,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            repetition_penalty=1.5,
            seed=1 << 60,
            n=2,
            stop=["a", "b"],
            stop_token_ids=[7],
            ignore_eos=True,
            min_tokens=1,
            logit_bias={4: -1.5},
            logprobs=2,
            echo=True,
            prompt_logprobs=3,
            include_stop=True,
            skip_special_tokens=False,
        ),
    )


def test_there_is_an_option_for_every_field_of_the_wire() -> None:
    wire = set(inference_pb2.SamplingParams.DESCRIPTOR.fields_by_name)
    wire |= set(inference_pb2.GenerateRequest.DESCRIPTOR.fields_by_name) - {"text", "token_ids", "sampling"}
    kinds = set(inference_pb2.Grammar.DESCRIPTOR.fields_by_name) - {"lark"}
    assert set(GenerateOptions.__annotations__) == wire | kinds | {"timeout_s"}


@pytest.mark.parametrize(
    ("options", "grammar"),
    [
        ({"json_schema": {"type": "integer"}}, {"json_schema": '{"type": "integer"}'}),
        ({"json_schema": '{"type":"integer"}'}, {"json_schema": '{"type":"integer"}'}),
        ({"json_object": True}, {"json_object": True}),
        ({"regex": "a+"}, {"regex": "a+"}),
        ({"choice": ["yes", "no"]}, {"choice": inference_pb2.Alternatives(texts=["yes", "no"])}),
        ({"choice": []}, {"choice": inference_pb2.Alternatives()}),
        ({"grammar": 'start: "a"'}, {"lark": 'start: "a"'}),
    ],
)
def test_a_grammar_is_named_by_its_kind(options: dict[str, Any], grammar: dict[str, Any]) -> None:
    assert build_request("hello", **options).sampling.grammar == inference_pb2.Grammar(**grammar)


def test_only_one_grammar_can_guide_a_text() -> None:
    with pytest.raises(InvalidRequestError, match=r"sampling.grammar: at most one .* json_object and regex"):
        build_request("hello", regex="a+", json_object=True)


def test_one_stop_string_needs_no_list() -> None:
    assert list(build_request("hello", stop="User:").sampling.stop) == ["User:"]


def test_an_option_that_does_not_exist_is_named() -> None:
    with pytest.raises(TypeError, match="max_token, temprature"):
        build_request("hello", temprature=1.0, max_token=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ([3, -1], {}, "token_ids"),
        ("\udcff", {}, "prompt"),
        ("hello", {"seed": -1}, "sampling.seed"),
        ("hello", {"top_k": 2**40}, "sampling.top_k"),
        ("hello", {"temperature": "hot"}, "sampling.temperature"),
        ("hello", {"priority": 2**40}, "priority"),
        ("hello", {"prompt_logprobs": -1}, "sampling.prompt_logprobs"),
        ("hello", {"json_schema": {"a": object()}}, "sampling.grammar.json_schema"),
        ("hello", {"regex": 3}, "sampling.grammar.regex"),
        ("hello", {"choice": [1]}, "sampling.grammar.choice"),
    ],
)
def test_a_value_that_its_field_cannot_hold_is_named(prompt: Any, options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        build_request(prompt, **options)
    assert caught.value.field == field
