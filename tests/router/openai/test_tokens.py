from __future__ import annotations

import pytest

from tests.router.openai.conftest import Http


async def test_a_text_becomes_tokens_and_text_again(http: Http) -> None:
    tokenized = await http.ok("/tokenize", model="mock", prompt="hello world")
    assert tokenized["count"] == len(tokenized["tokens"])
    assert tokenized["max_model_len"] == 512
    assert tokenized["token_strs"] is None
    assert tokenized["tokens"][0] == 0
    assert (await http.ok("/detokenize", tokens=tokenized["tokens"])) == {"prompt": "<s>hello world"}


async def test_special_tokens_can_be_left_out(http: Http) -> None:
    tokens = (await http.ok("/tokenize", prompt="hello", add_special_tokens=False))["tokens"]
    assert 0 not in tokens
    assert (await http.ok("/tokenize", prompt="", add_special_tokens=False))["count"] == 0


async def test_a_conversation_becomes_tokens(http: Http) -> None:
    messages = [{"role": "user", "content": "hello"}]
    tokenized = await http.ok("/tokenize", messages=messages, return_token_strs=True)
    assert "".join(tokenized["token_strs"]) == "user: hello\nassistant:"
    closed = await http.ok("/tokenize", messages=messages, return_token_strs=True, add_generation_prompt=False)
    assert "".join(closed["token_strs"]) == "user: hello\n"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [9999]}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
    ],
)
async def test_what_is_no_text_or_token_is_refused(http: Http, path: str, body: object, param: str) -> None:
    assert (await http.error(path, body))["param"] == param
