from __future__ import annotations

from typing import Any

import pytest

from baton.errors import OverloadedError, UnavailableError
from baton.v1 import inference_pb2
from tests.router.openai.conftest import Http, read_events
from tests.router.openai.fake_pipeline import LENGTH, STOP, answer, delta, position

PATH = "/v1/completions"


async def test_a_completion_has_openais_shape(http: Http) -> None:
    completion = await http.complete(model="mock", max_tokens=8)
    assert completion.pop("id").startswith("cmpl-")
    assert completion.pop("system_fingerprint").startswith("fp_")
    assert isinstance(completion.pop("created"), int)
    assert completion == {
        "object": "text_completion",
        "model": "mock",
        "choices": [{"index": 0, "text": "hi there", "logprobs": None, "finish_reason": "stop", "stop_reason": None}],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 3,
            "total_tokens": 6,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }
    assert http.pipeline.requests[0].text == "hello"


async def test_the_pipeline_gets_every_field(http: Http) -> None:
    await http.complete(
        max_tokens=7,
        n=1,
        best_of=1,
        temperature=0,
        top_p=0.5,
        top_k=-1,
        min_p=0.25,
        presence_penalty=1,
        frequency_penalty=-1.5,
        repetition_penalty=1.25,
        seed=-1,
        stop="x",
        stop_token_ids=[7, 8],
        include_stop_str_in_output=True,
        ignore_eos=True,
        min_tokens=2,
        logit_bias={"5": -100, "6": 2.5},
        skip_special_tokens=False,
        logprobs=2,
        priority=-3,
        cache_salt="tenant",
        user="someone",
    )
    (request,) = http.pipeline.requests
    assert (request.priority, request.cache_salt) == (-3, "tenant")
    assert request.sampling == inference_pb2.SamplingParams(
        max_tokens=7,
        temperature=0,
        top_p=0.5,
        top_k=0,
        min_p=0.25,
        presence_penalty=1,
        frequency_penalty=-1.5,
        repetition_penalty=1.25,
        seed=2**64 - 1,
        n=1,
        stop=["x"],
        stop_token_ids=[7, 8],
        include_stop=True,
        ignore_eos=True,
        min_tokens=2,
        logit_bias={5: -100, 6: 2.5},
        skip_special_tokens=False,
        logprobs=2,
    )


async def test_what_is_null_or_left_out_is_the_models_default(http: Http) -> None:
    await http.complete(
        temperature=None, logprobs=None, stop=None, suffix="", n=None, stream=None, prompt_logprobs=None
    )
    sampling = http.pipeline.sampling
    assert sampling == inference_pb2.SamplingParams(max_tokens=16, n=1, skip_special_tokens=True)


async def test_a_stream_has_one_event_for_each_token_even_without_text(http: Http) -> None:
    http.pipeline.script = lambda request: answer(delta("é"), delta(""), delta("", finish=STOP, stop_text="x"))
    events = await http.events(PATH, prompt="hello")
    assert [event["choices"][0]["text"] for event in events] == ["é", "", ""]
    assert [event["choices"][0]["finish_reason"] for event in events] == [None, None, "stop"]
    assert events[-1]["choices"][0]["stop_reason"] == "x"
    assert {event["object"] for event in events} == {"text_completion"}
    assert len({event["id"] for event in events}) == 1
    assert all("usage" not in event for event in events)


async def test_deltas_that_came_together_are_still_events_of_their_own(http: Http) -> None:
    last = answer(delta("c", finish=LENGTH))
    http.pipeline.script = lambda request: [
        inference_pb2.GenerateResponse(choices=[delta("a"), delta("b")]),
        *last,
    ]
    events = await http.events(PATH, prompt="hello")
    assert [event["choices"][0]["text"] for event in events] == ["a", "b", "c"]


async def test_usage_comes_last_if_asked_for(http: Http) -> None:
    events = await http.events(PATH, prompt="hello", stream_options={"include_usage": True})
    assert [event["usage"] for event in events[:-1]] == [None] * 3
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 3


async def test_usage_comes_with_every_event_if_asked_for(http: Http) -> None:
    prompt = inference_pb2.PromptEcho(text="hello", token_ids=[1, 2])
    http.pipeline.script = lambda request: answer(delta("a"), delta("b", finish=STOP), prompt=prompt)
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = await http.events(PATH, prompt="hello", stream_options=options)
    assert [(event["usage"]["prompt_tokens"], event["usage"]["completion_tokens"]) for event in events[:-1]] == [
        (2, 1),
        (2, 2),
    ]
    assert http.pipeline.sampling.echo


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a b", ["a b"]),
        ([5, 6], [[5, 6]]),
        (["a", "b"], ["a", "b"]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ],
)
async def test_prompts_are_texts_or_token_ids_one_or_many(http: Http, prompt: Any, expected: list[Any]) -> None:
    await http.complete(prompt=prompt)
    assert sorted((r.text or list(r.token_ids.ids) for r in http.pipeline.requests), key=str) == expected


async def test_choices_are_numbered_through_all_prompts(http: Http) -> None:
    def script(request: inference_pb2.GenerateRequest) -> list[inference_pb2.GenerateResponse]:
        return answer(
            delta(request.text + "0", index=0, finish=STOP),
            delta(request.text + "1", index=1, finish=STOP),
        )

    http.pipeline.script = script
    completion = await http.complete(prompt=["a", "b"], n=2)
    assert [(c["index"], c["text"]) for c in completion["choices"]] == [(0, "a0"), (1, "a1"), (2, "b0"), (3, "b1")]
    assert completion["usage"]["prompt_tokens"] == 6
    events = await http.events(PATH, prompt=["a", "b"], n=2)
    assert sorted((c["index"], c["text"]) for e in events for c in e["choices"]) == [
        (0, "a0"),
        (1, "a1"),
        (2, "b0"),
        (3, "b1"),
    ]


async def test_one_prompt_that_fails_ends_the_others(http: Http) -> None:
    good = answer(delta("a"), delta("b", finish=STOP))
    http.pipeline.gate.clear()
    http.pipeline.script = lambda request: [UnavailableError("gone")] if request.text == "bad" else good
    error = await http.error(PATH, {"prompt": ["good", "bad", "good"]}, 503)
    assert error["message"] == "gone"
    assert http.pipeline.closed == 3


async def test_special_tokens_are_added_by_the_pipeline_or_not_at_all(http: Http) -> None:
    await http.complete(prompt="hello", add_special_tokens=False)
    ids = (await http.ok("/tokenize", prompt="hello", add_special_tokens=False))["tokens"]
    assert list(http.pipeline.requests[0].token_ids.ids) == ids


async def test_a_prompt_is_cut_to_its_last_tokens_if_asked_for(http: Http) -> None:
    await http.complete(prompt=[5, 6, 7, 8], truncate_prompt_tokens=2)
    assert list(http.pipeline.requests[0].token_ids.ids) == [7, 8]


# Echo, logprobs, scoring ------------------------------------------------------------------------------------------


SCORED = inference_pb2.PromptEcho(
    text="he", token_ids=[0, 75, 72], logprobs=[position(75, -1.0, {75: -1.0}), position(72, -1.0, {72: -1.0})]
)


async def test_echo_puts_the_prompt_before_each_choice(http: Http) -> None:
    prompt = inference_pb2.PromptEcho(text="say ", token_ids=[1, 2])
    http.pipeline.script = lambda request: answer(
        delta("a", index=0, finish=STOP), delta("b", index=1, finish=STOP), prompt=prompt
    )
    completion = await http.complete(echo=True, n=2)
    assert [choice["text"] for choice in completion["choices"]] == ["say a", "say b"]
    assert http.pipeline.sampling.echo
    assert not http.pipeline.sampling.HasField("prompt_logprobs")
    events = await http.events(PATH, prompt="say ", echo=True, n=2)
    assert [event["choices"][0]["text"] for event in events] == ["say a", "say b"]


async def test_scoring_gives_every_token_of_the_prompt_but_the_first(http: Http) -> None:
    end = inference_pb2.ChoiceDelta(finish_reason=inference_pb2.FINISH_REASON_LENGTH)
    http.pipeline.script = lambda request: answer(end, prompt=SCORED)
    completion = await http.complete(prompt=[0, 75, 72], echo=True, logprobs=1, max_tokens=0)
    (choice,) = completion["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("he", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -1.0]
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert choice["logprobs"]["tokens"][0] == "<s>"
    assert len(choice["logprobs"]["text_offset"]) == 3
    assert http.pipeline.sampling.prompt_logprobs == 1
    assert http.pipeline.sampling.max_tokens == 0


async def test_scoring_with_one_token_more_is_what_evaluation_harnesses_ask(http: Http) -> None:
    http.pipeline.script = lambda request: answer(
        delta("!", 3, finish=LENGTH, logprobs=position(3, -2.0, {4: -0.5})), prompt=SCORED
    )
    completion = await http.complete(prompt=[0, 75, 72], echo=True, logprobs=1, max_tokens=1)
    logprobs = completion["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [None, -1.0, -1.0, -2.0]
    assert [len(top) for top in logprobs["top_logprobs"][1:]] == [1, 1, 2]


@pytest.mark.parametrize("max_inline_logprobs", [1024, 0])
async def test_choices_of_one_prompt_share_its_logprobs_and_not_their_own(
    http: Http, max_inline_logprobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.openai.completion_answer._MAX_INLINE_LOGPROBS", max_inline_logprobs)
    ends = [delta("!!", 3 + i, index=i, finish=LENGTH, logprobs=position(3 + i, -2.0 - i, {})) for i in range(2)]
    http.pipeline.script = lambda request: answer(*reversed(ends), prompt=SCORED)
    asked = {"prompt": [0, 75, 72], "echo": True, "logprobs": 1, "max_tokens": 1, "n": 2}
    whole = [choice["logprobs"] for choice in (await http.complete(**asked))["choices"]]
    events = [event["choices"][0] for event in await http.events(PATH, **asked)]
    assert whole == [event["logprobs"] for event in sorted(events, key=lambda choice: choice["index"])]
    assert [each["token_logprobs"] for each in whole] == [[None, -1.0, -1.0, -2.0], [None, -1.0, -1.0, -3.0]]
    assert whole[0]["text_offset"] == whole[1]["text_offset"]


async def test_a_prompt_of_too_many_ids_is_refused_before_they_are_looked_at(http: Http) -> None:
    for prompt, param in [([5] * 512, "prompt"), ([[5], ["x"] * 512], "prompt[1]")]:
        error = await http.error(PATH, {"prompt": prompt})
        assert (error["param"], error["code"]) == (param, "context_length_exceeded")
        assert "has 512 tokens; the model takes at most 511" in error["message"]
    assert http.pipeline.requests == []
    await http.complete(prompt=[5] * 512, truncate_prompt_tokens=3)
    assert list(http.pipeline.requests[0].token_ids.ids) == [5, 5, 5]


async def test_a_stream_has_the_logprobs_of_each_token(http: Http) -> None:
    http.pipeline.script = lambda request: answer(
        delta("a", 66, logprobs=position(66, -0.5, {67: -0.25})),
        delta("b", 67, finish=STOP, logprobs=position(67, -0.125, {67: -0.125})),
    )
    events = await http.events(PATH, prompt="x", logprobs=1)
    logprobs = [event["choices"][0]["logprobs"] for event in events]
    assert [each["token_logprobs"] for each in logprobs] == [[-0.5], [-0.125]]
    assert [each["text_offset"] for each in logprobs] == [[0], [1]]
    assert [len(each["top_logprobs"][0]) for each in logprobs] == [2, 1]


async def test_prompt_logprobs_are_vllms(http: Http) -> None:
    prompt = inference_pb2.PromptEcho(token_ids=[0, 66], logprobs=[position(66, -3.0, {67: -0.25})])
    http.pipeline.script = lambda request: answer(delta("a", finish=STOP), prompt=prompt)
    completion = await http.complete(prompt_logprobs=1)
    first, second = completion["choices"][0]["prompt_logprobs"]
    assert first is None
    assert {token_id: (each["logprob"], each["rank"]) for token_id, each in second.items()} == {
        "66": (-3.0, None),
        "67": (-0.25, 1),
    }


async def test_token_ids_are_returned_if_asked_for(http: Http) -> None:
    prompt = inference_pb2.PromptEcho(token_ids=[1, 2])
    http.pipeline.script = lambda request: answer(delta("a", 5), delta("b", 6, finish=STOP), prompt=prompt)
    (choice,) = (await http.complete(return_token_ids=True))["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([1, 2], [5, 6])
    first, second = await http.events(PATH, prompt="x", return_token_ids=True)
    assert (first["choices"][0]["prompt_token_ids"], first["choices"][0]["token_ids"]) == ([1, 2], [5])
    assert "prompt_token_ids" not in second["choices"][0]


# Errors -----------------------------------------------------------------------------------------------------------


async def test_an_error_before_the_first_token_is_an_ordinary_one(http: Http) -> None:
    http.pipeline.script = lambda request: [OverloadedError("the queue is full")]
    for stream in (False, True):
        response = await http.post(PATH, {"prompt": "x", "stream": stream}, x_request_id="mine")
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1"
        assert response.headers["x-request-id"] == "mine"
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")


async def test_an_error_after_the_first_token_is_the_last_event(http: Http) -> None:
    http.pipeline.script = lambda request: [*answer(delta("a")), UnavailableError("the worker died")]
    response = await http.post(PATH, {"prompt": "x", "stream": True})
    assert response.status_code == 200
    first, error = read_events(response.content)
    assert first["choices"][0]["text"] == "a"
    assert error["error"]["message"] == "the worker died"
    assert error["error"]["type"] == "service_unavailable_error"


async def test_a_fault_of_ours_tells_nothing(http: Http, caplog: pytest.LogCaptureFixture) -> None:
    http.pipeline.script = lambda request: [RuntimeError("secret")]
    error = await http.error(PATH, {"prompt": "x"}, 500)
    assert error["message"] == "internal error; see the router's log"
    assert "secret" in caplog.text
