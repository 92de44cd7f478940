from __future__ import annotations

import pytest

from baton.config import RouterConfig
from baton.grammar import check_grammar
from baton.v1 import inference_pb2
from baton.wire import grammar_from_wire
from router.openai.chat_format import Turn
from router.openai.chat_request import ChatRequest
from router.openai.reasoning import Thinking
from tests.router.openai.conftest import Http
from tests.router.openai.fake_pipeline import answer, words

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def router_config() -> RouterConfig:
    return RouterConfig(reasoning_format="qwen3")


def says(http: Http, text: str) -> None:
    http.pipeline.script = lambda request: answer(*words(text))


async def test_reasoning_is_told_apart(http: Http) -> None:
    says(http, "because</think>so")
    message = (await http.chat(chat_template_kwargs={"think": True}))["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("because", "so")
    events = await http.events(PATH, messages=HELLO, chat_template_kwargs={"think": True})
    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(each.get("reasoning_content", "") for each in deltas) == "because"
    assert "".join(each.get("content", "") for each in deltas) == "so"


async def test_reasoning_is_left_out_if_not_wanted(http: Http) -> None:
    says(http, "because</think>so")
    chat = await http.chat(chat_template_kwargs={"think": True}, include_reasoning=False)
    assert chat["choices"][0]["message"] == {"role": "assistant", "content": "so", "refusal": None}


async def test_a_constraint_lets_the_reasoning_end_first(http: Http) -> None:
    await http.chat(response_format={"type": "json_object"}, chat_template_kwargs={"think": True})
    await http.chat(response_format={"type": "json_object"})
    open_reasoning, none = (request.sampling.grammar for request in http.pipeline.requests)
    assert "</think>" in open_reasoning.lark
    assert none.json_object


def test_the_text_has_special_tokens_where_the_end_of_reasoning_is_one() -> None:
    request = ChatRequest.model_validate({"messages": HELLO})
    cases: list[tuple[Thinking, bool, bool]] = [("open", True, True), ("open", False, False), ("none", True, False)]
    for thinking, special, shown in cases:
        sampling = inference_pb2.SamplingParams()
        tokens = {"</think>": 7} if special else {}
        Turn(request, tokens, tool_format=None, thinking=thinking).shape(sampling)
        assert (sampling.HasField("skip_special_tokens") and not sampling.skip_special_tokens) is shown


@pytest.mark.parametrize(
    ("regex", "rule"),
    [("a/b", r"/a\/b/"), (r"a\/b", r"/a\/b/"), (r"a\\/b", r"/a\\\/b/"), (r"\d+\.", r"/\d+\./")],
)
async def test_slashes_of_a_regular_expression_do_not_end_it(http: Http, regex: str, rule: str) -> None:
    """Reasoning comes first in a grammar in Lark, where slashes stand around expressions."""
    await http.chat(guided_regex=regex, chat_template_kwargs={"think": True})
    grammar = http.pipeline.sampling.grammar
    assert rule in grammar.lark
    parsed = grammar_from_wire(grammar)
    assert parsed is not None
    check_grammar(parsed)
