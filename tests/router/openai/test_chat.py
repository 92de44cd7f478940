from __future__ import annotations

import json
from typing import Any

import pytest

from baton.v1 import inference_pb2
from tests.router.openai.conftest import Http
from tests.router.openai.fake_pipeline import LENGTH, STOP, answer, delta, position, words

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def says(http: Http, text: str, finish: int = STOP) -> None:
    http.pipeline.script = lambda request: answer(*words(text, finish))


async def prompt_of(http: Http, index: int = 0) -> str:
    """The prompt that the pipeline got."""
    ids = list(http.pipeline.requests[index].token_ids.ids)
    text: str = (await http.ok("/detokenize", tokens=ids))["prompt"]
    return text


async def test_a_chat_has_openais_shape(http: Http) -> None:
    chat = await http.chat(model="mock")
    assert chat.pop("id").startswith("chatcmpl-")
    assert chat.pop("system_fingerprint").startswith("fp_")
    assert isinstance(chat.pop("created"), int)
    assert chat == {
        "object": "chat.completion",
        "model": "mock",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hi there", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 3,
            "total_tokens": 6,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def test_messages_go_through_the_chat_template(http: Http) -> None:
    await http.chat(messages=[{"role": "system", "content": "be brief"}, *HELLO])
    assert await prompt_of(http) == "system: be brief\nuser: hello\nassistant:"


async def test_the_answer_may_be_long_unless_it_is_limited(http: Http) -> None:
    await http.chat()
    await http.chat(max_tokens=5)
    await http.chat(max_tokens=5, max_completion_tokens=6)
    limits = [request.sampling for request in http.pipeline.requests]
    assert [each.max_tokens if each.HasField("max_tokens") else None for each in limits] == [None, 5, 6]


async def test_the_last_message_may_be_left_open(http: Http) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "well,"}]
    await http.chat(messages=messages, add_generation_prompt=False, continue_final_message=True)
    assert await prompt_of(http) == "user: hello\nassistant: well,"


async def test_a_stream_has_the_role_first_and_one_event_for_each_token(http: Http) -> None:
    http.pipeline.script = lambda request: answer(delta("a"), delta(""), delta("b", finish=LENGTH))
    events = await http.events(PATH, messages=HELLO, stream_options={"include_usage": True})
    *chunks, usage = events
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": "a"},
        {"content": ""},
        {"content": "b"},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "length"]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 6


async def test_logprobs_have_the_bytes_of_each_token(http: Http) -> None:
    token_id = (await http.ok("/tokenize", prompt="h", add_special_tokens=False))["tokens"][0]
    http.pipeline.script = lambda request: answer(
        delta("h", token_id, finish=STOP, logprobs=position(token_id, -0.5, {token_id: -0.5}))
    )
    expected = {"token": "h", "logprob": -0.5, "bytes": [104]}
    content = [{**expected, "top_logprobs": [expected]}]
    chat = await http.chat(logprobs=True, top_logprobs=1)
    assert chat["choices"][0]["logprobs"] == {"content": content, "refusal": None}
    (event,) = await http.events(PATH, messages=HELLO, logprobs=True, top_logprobs=1)
    assert event["choices"][0]["logprobs"]["content"] == content
    assert http.pipeline.requests[0].sampling.logprobs == 1
    named = await http.chat(logprobs=True, return_tokens_as_token_ids=True)
    assert named["choices"][0]["logprobs"]["content"][0]["token"] == f"token_id:{token_id}"


async def test_token_ids_are_returned_if_asked_for(http: Http) -> None:
    prompt = inference_pb2.PromptEcho(token_ids=[1, 2])
    http.pipeline.script = lambda request: answer(delta("a", 5), delta("b", 6, finish=STOP), prompt=prompt)
    chat = await http.chat(return_token_ids=True)
    assert (chat["prompt_token_ids"], chat["choices"][0]["token_ids"]) == ([1, 2], [5, 6])
    first, second = await http.events(PATH, messages=HELLO, return_token_ids=True)
    assert (first["prompt_token_ids"], first["choices"][0]["token_ids"]) == ([1, 2], [5])
    assert "prompt_token_ids" not in second


# Tools ------------------------------------------------------------------------------------------------------------


async def test_calls_are_parsed_out_of_the_answer(http: Http) -> None:
    says(http, CALL)
    chat = await http.chat(tools=[WEATHER])
    (choice,) = chat["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call.pop("id").startswith("call_")
    assert call == {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    assert "<tool_call>weather" in await prompt_of(http)


async def test_calls_stream_in_pieces_and_every_token_is_an_event(http: Http) -> None:
    says(http, "Well. " + CALL)
    events = await http.events(PATH, messages=HELLO, tools=[WEATHER])
    assert len(events) == len(words("Well. " + CALL))
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0]["role"] == "assistant"
    assert "".join(each.get("content", "") for each in deltas) == "Well."
    pieces = [call for each in deltas for call in each.get("tool_calls", [])]
    assert [piece["index"] for piece in pieces] == [0] * len(pieces)
    assert pieces[0]["function"]["name"] == "weather"
    assert all("id" not in piece for piece in pieces[1:])
    assert json.loads("".join(piece["function"]["arguments"] for piece in pieces)) == {"city": "Oslo"}
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_only_the_first_call_is_passed_on_where_calls_must_not_be_parallel(http: Http) -> None:
    says(http, CALL + CALL)
    assert len((await http.chat(tools=[WEATHER]))["choices"][0]["message"]["tool_calls"]) == 2
    chat = await http.chat(tools=[WEATHER], parallel_tool_calls=False)
    assert len(chat["choices"][0]["message"]["tool_calls"]) == 1


async def test_a_call_that_breaks_off_is_not_finished(http: Http) -> None:
    says(http, CALL[:50], finish=LENGTH)
    chat = await http.chat(tools=[WEATHER])
    assert chat["choices"][0]["finish_reason"] == "length"


async def test_without_tools_nothing_is_parsed(http: Http) -> None:
    says(http, CALL)
    for fields in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        chat = await http.chat(**fields)
        assert chat["choices"][0]["message"]["content"] == CALL
        assert chat["choices"][0]["finish_reason"] == "stop"
    assert "<tool_call>" not in await prompt_of(http, 1)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
async def test_a_demanded_call_is_a_grammar(http: Http, choice: Any) -> None:
    says(http, CALL)
    chat = await http.chat(tools=[WEATHER], tool_choice=choice)
    assert chat["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "weather"
    assert "weather" in http.pipeline.sampling.grammar.lark


async def test_calls_and_their_results_are_messages(http: Http) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    await http.chat(
        messages=[
            *HELLO,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        ],
        tools=[WEATHER],
    )
    assert "tool: rain" in await prompt_of(http)
