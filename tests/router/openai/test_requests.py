"""What clients may not send, and what they are told."""

from __future__ import annotations

from typing import Any

import pydantic
import pytest

from baton.errors import InvalidRequestError
from router.openai.errors import ApiError, as_validation_error, shown
from tests.router.openai.conftest import Http

HELLO = [{"role": "user", "content": "hello"}]
FUNCTION = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("fields", "param", "problem"),
    [
        ({"prompt": None}, "prompt", "is required"),
        ({"prompt": 5}, "prompt", "must be a string, a list"),
        ({"prompt": []}, "prompt", "is empty"),
        ({"prompt": [[]]}, "prompt[0]", "at least one token"),
        ({"prompt": ["a", 5]}, "prompt[1]", "must be a string, a list"),
        ({"prompt": [1, "a"]}, "prompt[1]", "must be a token id"),
        ({"prompt": [1, True]}, "prompt[1]", "must be a token id"),
        ({"prompt": [[1], [-1]]}, "prompt[1][0]", "must be a token id"),
        ({"prompt": ["a"] * 5}, "prompt", "has 5 prompts; at most 4 are allowed"),
        ({"model": 5}, "model", "must be a string, got 5"),
        ({"max_tokens": "5"}, "max_tokens", 'must be an integer, got "5"'),
        ({"max_tokens": 1.5}, "max_tokens", "must be an integer, got 1.5"),
        ({"max_tokens": True}, "max_tokens", "must be an integer, got true"),
        ({"max_tokens": -1}, "max_tokens", "must be greater than or equal to 0"),
        ({"max_tokens": 2**40}, "max_tokens", "must be less than or equal to"),
        ({"n": 0}, "n", "must be greater than or equal to 1"),
        ({"best_of": 2}, "best_of", "is not served"),
        ({"temperature": "hot"}, "temperature", "must be a number"),
        ({"temperature": 1e300}, "temperature", "out of range"),
        ({"top_k": -2}, "top_k", "must be greater than or equal to -1"),
        ({"stop": [5]}, "stop", "must be a string or a list of strings"),
        ({"stop": 5}, "stop", "must be a string or a list of strings"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "must be greater than or equal to 0"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "keys must be token ids, got 'a'"),
        ({"logit_bias": {"99999999999": 1}}, "logit_bias", "keys must be token ids"),
        ({"logit_bias": {"5": "x"}}, "logit_bias.5", "must be a number"),
        ({"stream": "yes"}, "stream", "must be true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "can only go with stream"),
        ({"stream": True, "stream_options": 5}, "stream_options", "must be an object"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "cannot go with stream"),
        ({"logprobs": -1}, "logprobs", "must be greater than or equal to 0"),
        ({"cache_salt": ""}, "cache_salt", "must have at least 1 character"),
        ({"suffix": "x"}, "suffix", "is not served"),
        ({"use_beam_search": True}, "use_beam_search", "is not served"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "must be 'text', 'json_object' or"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type", "is not served"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "is required"),
        ({"guided_json": 5}, "guided_json", "must be a JSON schema"),
        ({"guided_choice": "a"}, "guided_choice", "must be a list"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "cannot go with guided_regex"),
        (
            {"structured_outputs": {"regex": "a", "json": {}}},
            "structured_outputs.regex",
            "cannot go with structured_outputs.json",
        ),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "is not served"),
    ],
)
async def test_a_completion_names_the_field_that_is_wrong(
    http: Http, fields: dict[str, Any], param: str, problem: str
) -> None:
    error = await http.error("/v1/completions", {"prompt": "x", **fields})
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: ")
    assert problem in error["message"]
    assert http.pipeline.requests == []


@pytest.mark.parametrize(
    ("fields", "param", "problem"),
    [
        ({"messages": None}, "messages", "is required"),
        ({"messages": []}, "messages", "is empty"),
        ({"messages": "hello"}, "messages", "must be a list"),
        ({"messages": ["hello"]}, "messages[0]", "must be an object"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "must be a string"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is required"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "must be a string or a list of parts"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
            "only text is served, got a part of type 'image_url'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0]",
            "must be an object with a type and a text",
        ),
        (
            {"messages": [{"role": "assistant", "function_call": {"name": "f"}}]},
            "messages[0].function_call",
            "is not served; use tool_calls",
        ),
        ({"functions": [{"name": "f"}]}, "functions", "is not served; use tools"),
        ({"function_call": "auto"}, "function_call", "is not served; use tool_choice"),
        ({"chat_template": "x"}, "chat_template", "cannot be chosen by a request"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "messages is a field of the request"),
        ({"top_logprobs": 2}, "top_logprobs", "can only go with logprobs set to true"),
        ({"logprobs": 2}, "logprobs", "must be true or false"),
        ({"tools": [{"type": "search"}]}, "tools[0].type", "must be 'function'"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "must be an object"),
        ({"tools": [{"function": {}}]}, "tools[0].function.name", "must be a string"),
        ({"tools": [{"function": {"name": "f", "parameters": 5}}]}, "tools[0].function.parameters", "JSON schema"),
        ({"tool_choice": "auto"}, "tool_choice", "can only go with tools"),
        ({"tool_choice": "maybe", "tools": [FUNCTION]}, "tool_choice", "must be 'none', 'auto', 'required' or"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [FUNCTION]},
            "tool_choice",
            "names 'g', which is none of the tools",
        ),
        (
            {"tool_choice": "required", "tools": [FUNCTION], "response_format": {"type": "json_object"}},
            "tool_choice",
            "cannot go with another constraint",
        ),
        ({"continue_final_message": True}, "continue_final_message", "cannot go with add_generation_prompt"),
    ],
)
async def test_a_chat_names_the_field_that_is_wrong(
    http: Http, fields: dict[str, Any], param: str, problem: str
) -> None:
    error = await http.error("/v1/chat/completions", {"messages": HELLO, **fields})
    assert error["param"] == param
    assert problem in error["message"]
    assert http.pipeline.requests == []


@pytest.mark.parametrize(
    ("raised", "fields", "param", "code"),
    [
        (("sampling.n", "must be from 1 to 16, got 99"), {}, "n", "invalid_value"),
        (("prompt", "has 999 tokens; (max_model_len 512)"), {}, "messages", "context_length_exceeded"),
        (("sampling.max_tokens", "exceed max_model_len 512"), {}, "max_tokens", "context_length_exceeded"),
        (
            ("sampling.max_tokens", "must be at least 1"),
            {"max_completion_tokens": 0},
            "max_completion_tokens",
            "invalid_value",
        ),
        (("sampling.logprobs", "must be at most 20"), {"logprobs": True}, "top_logprobs", "invalid_value"),
        (
            ("sampling.grammar.json_schema", "is wrong"),
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format",
            "invalid_value",
        ),
        (("sampling.grammar.lark", "is wrong"), {"guided_grammar": "x"}, "guided_grammar", "invalid_value"),
    ],
)
async def test_what_the_pipeline_refuses_has_this_apis_names(
    http: Http, raised: tuple[str, str], fields: dict[str, Any], param: str, code: str
) -> None:
    http.pipeline.script = lambda request: [InvalidRequestError(*raised)]
    for stream in (False, True):
        error = await http.error("/v1/chat/completions", {"messages": HELLO, "stream": stream, **fields})
        assert (error["param"], error["code"]) == (param, code)
        assert error["message"] == f"{param}: {raised[1]}"


@pytest.mark.parametrize(
    ("fields", "kind", "value"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", True),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}},
            "json_schema",
            '{"type": "object"}',
        ),
        ({"guided_json": '{"type": "object"}'}, "json_schema", '{"type": "object"}'),
        ({"guided_json": {"type": "object"}}, "json_schema", '{"type": "object"}'),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"guided_grammar": "start: /a/"}, "lark", "start: /a/"),
        ({"structured_outputs": {"json": {"type": "object"}}}, "json_schema", '{"type": "object"}'),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"grammar": "start: /a/"}}, "lark", "start: /a/"),
        ({"structured_outputs": {"json_object": True}}, "json_object", True),
    ],
)
async def test_every_way_to_constrain_the_answer_is_a_grammar(
    http: Http, fields: dict[str, Any], kind: str, value: object
) -> None:
    await http.complete(**fields)
    assert getattr(http.pipeline.sampling.grammar, kind) == value


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/detokenize", {"tokens": [{}] * 3000}, "tokens[0]"),
        ("/v1/completions", {"prompt": "x", "stop_token_ids": [{}] * 3000}, "stop_token_ids[0]"),
        ("/v1/completions", {"prompt": "x", "guided_choice": [0] * 3000}, "guided_choice[0]"),
        ("/v1/completions", {"prompt": "x", "structured_outputs": {"choice": [0] * 3000}}, "structured_outputs.choice"),
        ("/v1/completions", {"prompt": "x", "logit_bias": {str(i): {} for i in range(1000)}}, "logit_bias.0"),
        ("/v1/chat/completions", {"messages": [0] * 3000}, "messages[0]"),
        ("/v1/chat/completions", {"messages": HELLO, "tools": [0] * 3000}, "tools[0]"),
        ("/v1/chat/completions", {"messages": HELLO, "documents": [0] * 3000}, "documents[0]"),
    ],
)
async def test_only_the_first_wrong_element_of_a_list_is_looked_at(
    http: Http, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], param: str
) -> None:
    counts: list[int] = []

    def note(error: pydantic.ValidationError) -> ApiError:
        counts.append(error.error_count())
        return as_validation_error(error)

    monkeypatch.setattr("router.openai.body.as_validation_error", note)
    assert (await http.error(path, body))["param"].startswith(param)
    assert counts in ([], [1])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("x" * 10**4, '"' + "x" * 100 + '"...'),
        ([{}] * 10**6, "a list"),
        ({"a": "x" * 10**6}, "an object"),
        pytest.param(1 << 20000, "a huge integer", id="huge"),
        (True, "true"),
        (1.5, "1.5"),
        ("é", '"\\u00e9"'),
    ],
)
def test_a_wrong_value_is_quoted_in_few_characters(value: object, text: str) -> None:
    assert shown(value) == text


async def test_choices_are_alternatives_and_text_is_no_constraint(http: Http) -> None:
    await http.complete(guided_choice=["a", "b"])
    await http.complete(structured_outputs={"choice": ["a", "b"]}, response_format={"type": "text"})
    await http.complete(response_format={"type": "text"})
    first, second, third = (request.sampling for request in http.pipeline.requests)
    assert list(first.grammar.choice.texts) == list(second.grammar.choice.texts) == ["a", "b"]
    assert not third.HasField("grammar")


async def test_unknown_fields_are_ignored(http: Http) -> None:
    await http.complete(no_such_field=5, user="me", metadata={"a": "b"})
    await http.chat(store=False, service_tier="auto", verbosity="low")
    assert len(http.pipeline.requests) == 2


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "EOF"),
        (b"{", "EOF"),
        (b'{"prompt": "\xff"}', "invalid unicode"),
        (b'{"prompt": "\\ud800"}', "hex escape"),
        (b'{"prompt": "x", "temperature": NaN}', "expected value"),
        (b'{"prompt": "x", "temperature": Infinity}', "expected value"),
        (b"[" * 1000, "recursion limit"),
    ],
)
async def test_a_body_that_is_no_json_is_refused(http: Http, body: bytes, problem: str) -> None:
    headers = {"content-type": "application/json"}
    response = await http.client.post("/v1/completions", content=body, headers=headers)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (None, "invalid_json")
    assert problem in error["message"]


@pytest.mark.parametrize("body", [b"5", b'"x"', b"[]", b"null"])
async def test_a_body_that_is_no_object_is_refused(http: Http, body: bytes) -> None:
    response = await http.client.post("/tokenize", content=body, headers={"content-type": "application/json"})
    assert response.json()["error"]["message"] == "the body must be a JSON object"


@pytest.mark.parametrize("field", ["temperature", "guided_json"])
async def test_numbers_that_overflow_are_refused(http: Http, field: str) -> None:
    value = b"1e999" if field == "temperature" else b'{"minimum": 1e999}'
    body = b'{"prompt": "x", "%s": %s}' % (field.encode(), value)
    response = await http.client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert "finite" in response.json()["error"]["message"]


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
async def test_what_is_not_called_json_is_refused(http: Http, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    response = await http.client.post("/v1/completions", content=b'{"prompt": "x"}', headers=headers)
    assert response.status_code == 415
    assert response.json()["error"]["code"] == "unsupported_media_type"


async def test_a_body_that_is_too_large_is_refused(http: Http) -> None:
    async def chunks() -> Any:
        for _ in range(30):
            yield b" " * 1000

    headers = {"content-type": "application/json"}
    announced = await http.client.post("/v1/completions", content=b" " * 20_001, headers=headers)
    counted = await http.client.post("/v1/completions", content=chunks(), headers=headers)
    for response in (announced, counted):
        assert response.status_code == 413
        assert response.json()["error"]["message"] == "the body has more than 20000 bytes"
        assert response.headers["connection"] == "close"
