"""A demanded call: what each format's grammar admits, as the grammar library itself sees it."""

import json

import pytest
from llguidance import LLMatcher, LLTokenizer
from llguidance._tokenizer import TokenizerWrapper

from baton.errors import InvalidRequestError
from router.openai.tools import FORMATS, make_parser, tool_grammar
from tests.router.openai.tools.conversation import CALLS, TOOLS, WRITERS, parse

SPECIAL_TEXTS = [
    *("[TOOL_CALLS]", "[ARGS]", "<tool_call>", "</tool_call>", "</think>"),
    *("<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|start|>"),
    *(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁calls▁end｜>",
    ),
]
SPECIAL = {text: 257 + i for i, text in enumerate(SPECIAL_TEXTS)}
REQUIRED = "required"
NAMED = {"type": "function", "function": {"name": "get_weather"}}


class Bytes:
    """A tokenizer of single bytes and the special tokens of all formats."""

    eos_token_id = 256
    bos_token_id = None
    tokens = [bytes([i]) for i in range(256)] + [b"<eos>"] + [text.encode() for text in SPECIAL]
    special_token_ids = [256, *SPECIAL.values()]  # noqa: RUF012

    def __call__(self, text):
        return list(text if isinstance(text, bytes) else text.encode())


@pytest.fixture(scope="module")
def tokenizer():
    return LLTokenizer(TokenizerWrapper(Bytes()))


def encode(text, special):
    """Token ids; special tokens by their ids where the grammar knows them as such."""
    for token in special:
        text = text.replace(token, chr(0xE000 + special[token]))
    return [
        token for char in text for token in ([ord(char) - 0xE000] if 0xE000 <= ord(char) < 0xF000 else char.encode())
    ]


def admits(tokenizer, grammar, text, special=SPECIAL):
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(grammar.lark))
    assert not matcher.is_error(), f"{matcher.get_error()}\n{grammar.lark}"
    tokens = encode(text, special)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def write(name, calls, special=SPECIAL):
    """As a model of this format would, white space at the end left out."""
    if name == "mistral" and special:
        return "".join(f"[TOOL_CALLS]{n}[ARGS]{json.dumps(a, ensure_ascii=False)}" for n, a in calls)
    text = WRITERS[name](calls).removesuffix("\n")
    if name == "pythonic":  # the grammar writes values as JSON, which the parser reads as well
        text = (
            "["
            + ", ".join(
                f"{n}({', '.join(f'{k}={json.dumps(v, ensure_ascii=False)}' for k, v in a.items())})" for n, a in calls
            )
            + "]"
        )
    return text.removesuffix("<|call|>")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("special", [SPECIAL, {}], ids=["special-tokens", "plain-text"])
class TestRequired:
    @pytest.mark.parametrize("calls", [CALLS["one"], CALLS["empty"], CALLS["hard"][:1]])
    def test_admits_what_the_parser_reads(self, tokenizer, name, special, calls):
        grammar = tool_grammar(name, TOOLS, REQUIRED, True, special_tokens=special)
        text = write(name, calls, special)
        assert admits(tokenizer, grammar, text, special)
        assert parse(make_parser(name, TOOLS), [text]).values == calls

    def test_admits_several_calls_where_they_may_be_parallel(self, tokenizer, name, special):
        if name == "harmony":
            pytest.skip("a call ends the turn")
        text = write(name, CALLS["two"], special)
        assert admits(tokenizer, tool_grammar(name, TOOLS, REQUIRED, True, special_tokens=special), text, special)
        assert not admits(tokenizer, tool_grammar(name, TOOLS, REQUIRED, False, special_tokens=special), text, special)

    @pytest.mark.parametrize(
        "wrong",
        [
            [("rm", {"path": "/"})],
            [("get_weather", {})],
            [("get_weather", {"city": "Köln", "days": 1.5})],
            [("get_weather", {"city": "Köln", "units": "kelvin"})],
            [("get_weather", {"city": "Köln", "when": "now"})],
        ],
        ids=["tool", "missing", "type", "enum", "unknown"],
    )
    def test_refuses_other_calls(self, tokenizer, name, special, wrong):
        grammar = tool_grammar(name, TOOLS, REQUIRED, True, special_tokens=special)
        assert not admits(tokenizer, grammar, write(name, wrong, special), special)

    def test_refuses_an_answer_in_words(self, tokenizer, name, special):
        assert not admits(
            tokenizer, tool_grammar(name, TOOLS, REQUIRED, True, special_tokens=special), "It rains.", special
        )

    def test_named_admits_this_function_alone_and_once(self, tokenizer, name, special):
        grammar = tool_grammar(name, TOOLS, NAMED, True, special_tokens=special)
        assert admits(tokenizer, grammar, write(name, CALLS["one"], special), special)
        assert not admits(tokenizer, grammar, write(name, CALLS["empty"], special), special)
        assert not admits(tokenizer, grammar, write(name, CALLS["one"] * 2, special), special)


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_is_demanded_unless_the_client_says_so(name):
    assert [tool_grammar(name, TOOLS, choice, True) for choice in (None, "auto", "none")] == [None] * 3


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "harmony"])
@pytest.mark.parametrize("special", [SPECIAL, {}], ids=["special-tokens", "plain-text"])
def test_reasoning_comes_first_where_the_model_reasons(tokenizer, name, special):
    call = write(name, CALLS["one"], special)
    optional = tool_grammar(name, TOOLS, REQUIRED, True, special_tokens=special, thinking="optional")
    opened = tool_grammar(name, TOOLS, REQUIRED, True, special_tokens=special, thinking="open")
    assert admits(tokenizer, optional, call, special)
    assert admits(tokenizer, optional, f"<think>\nRain?\n</think>\n\n{call}", special)
    assert admits(tokenizer, opened, f"Rain?\n</think>\n\n{call}", special)
    assert not admits(tokenizer, opened, call, special)


def test_harmony_may_reason_on_its_own_channel(tokenizer):
    text = "<|channel|>analysis<|message|>Rain?<|end|><|start|>assistant" + write("harmony", CALLS["one"])
    assert admits(tokenizer, tool_grammar("harmony", TOOLS, REQUIRED, True, special_tokens=SPECIAL), text)
    result = parse(make_parser("harmony", TOOLS), [text])
    assert (result.reasoning, result.values) == ("Rain?", CALLS["one"])


def with_parameters(parameters):
    return [{"type": "function", "function": {"name": "f", "parameters": parameters}}]


@pytest.mark.parametrize("name", FORMATS)
def test_schemas_may_refer_to_their_own_definitions(tokenizer, name):
    tools = with_parameters(
        {
            "type": "object",
            "properties": {"point": {"$ref": "#/$defs/point"}},
            "required": ["point"],
            "$defs": {"point": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}},
        }
    )
    grammar = tool_grammar(name, tools, REQUIRED, True, special_tokens=SPECIAL)
    assert admits(tokenizer, grammar, write(name, [("f", {"point": {"x": 1}})]))
    assert not admits(tokenizer, grammar, write(name, [("f", {"point": {"x": "1"}})]))
    text = write(name, [("f", {"point": {"x": 1}})])
    assert parse(make_parser(name, tools), [text]).values == [("f", {"point": {"x": 1}})]


@pytest.mark.parametrize("name", ["pythonic", "qwen3_coder"])
def test_optional_arguments_may_be_left_out_but_keep_their_order(tokenizer, name):
    tools = with_parameters(
        {"type": "object", "properties": {key: {"type": "integer"} for key in "abc"}, "required": ["b"]}
    )
    grammar = tool_grammar(name, tools, REQUIRED, True, special_tokens=SPECIAL)
    for keys in ("b", "ab", "bc", "abc"):
        assert admits(tokenizer, grammar, write(name, [("f", dict.fromkeys(keys, 1))])), keys
    for keys in ("", "a", "c", "ac", "ba"):
        assert not admits(tokenizer, grammar, write(name, [("f", dict.fromkeys(keys, 1))])), keys


@pytest.mark.parametrize("name", ["pythonic", "qwen3_coder"])
def test_formats_that_cannot_express_a_schema_say_so(name):
    with pytest.raises(InvalidRequestError, match="f: calls in this model's format cannot be forced with anyOf"):
        tool_grammar(name, with_parameters({"anyOf": [{"type": "object"}]}), REQUIRED, True)
    for required in (5, [5], {"a": 1}):
        with pytest.raises(InvalidRequestError, match="tools: f: required must be a list of names"):
            tool_grammar(name, with_parameters({"type": "object", "required": required}), REQUIRED, True)
    odd = {"type": "object", "properties": {"a": {"anyOf": 5}}}
    tool_grammar(name, with_parameters(odd), REQUIRED, True)
    with pytest.raises(InvalidRequestError, match="'a' is required and not described"):
        tool_grammar(name, with_parameters({"type": "object", "required": ["a"]}), REQUIRED, True)


@pytest.mark.parametrize("name", FORMATS)
def test_white_space_within_arguments_has_an_end(tokenizer, name):
    grammar = tool_grammar(name, TOOLS, REQUIRED, True, special_tokens=SPECIAL)
    text = write(name, [("save", {"lines": ["a", "b"], "force": True})])
    assert admits(tokenizer, grammar, text)
    assert not admits(tokenizer, grammar, text.replace('"a", "b"', f'"a",{" " * 100}"b"'))


class TestMistakes:
    def test_no_tools(self):
        with pytest.raises(InvalidRequestError, match="tool_choice: demands a call, but the request has no tools"):
            tool_grammar("hermes", [], REQUIRED, True)

    def test_unknown_function(self):
        with pytest.raises(InvalidRequestError, match="tool_choice: names 'rm', which is none of the request's tools"):
            tool_grammar("hermes", TOOLS, {"type": "function", "function": {"name": "rm"}}, True)

    @pytest.mark.parametrize("choice", ["always", 1, {"type": "function"}, {"function": "now"}])
    def test_no_choice_at_all(self, choice):
        with pytest.raises(InvalidRequestError, match="tool_choice: must be"):
            tool_grammar("hermes", TOOLS, choice, True)
