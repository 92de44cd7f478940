"""The spellings within each format that models are known for, and what is forgiven."""

import json

import pytest

from router.openai.tools import make_parser
from tests.router.openai.tools.conversation import TOOLS, parse

WEATHER = ("get_weather", {"city": "Köln"})
OBJECT = '{"city": "Köln"}'


def read(name, text):
    whole = parse(make_parser(name, TOOLS), [text])
    assert parse(make_parser(name, TOOLS), list(text)) == whole
    return whole


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", f'<tool_call>{{"name": "get_weather", "arguments": {OBJECT}}}</tool_call>'),
        ("hermes", f'<tool_call>\n{{"arguments": {OBJECT}, "name": "get_weather"}}\n</tool_call>'),
        ("hermes", f'<tool_call>{{"name": "get_weather", "arguments": {json.dumps(OBJECT)}}}</tool_call>'),
        ("hermes", f'<tool_call>{{"id": [1], "name": "get_weather", "parameters": {OBJECT}}}'),
        ("hermes", f'<tool_call>\n<tool_call>\n{{"name": "get_weather", "arguments": {OBJECT}}}\n</tool_call>'),
        ("llama3_json", f'{{"name": "get_weather", "parameters": {OBJECT}}}'),
        ("llama3_json", f'\n{{"type": "function", "name": "get_weather", "arguments": {OBJECT}}}'),
        ("llama3_json", f'<|python_tag|>{{"name": "get_weather", "parameters": {OBJECT}}}'),
        ("llama3_json", f'<|python_start|>{{"name": "get_weather", "parameters": {OBJECT}}}<|python_end|>'),
        ("mistral", f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {OBJECT}, "id": "abcdefghi"}}]'),
        ("mistral", f'[TOOL_CALLS] {{"name": "get_weather", "arguments": {OBJECT}}}'),
        ("mistral", f"[TOOL_CALLS]get_weather{OBJECT}"),
        ("mistral", f"[TOOL_CALLS]get_weather[ARGS]{OBJECT}"),
        ("mistral", f"[TOOL_CALLS]get_weather[CALL_ID]a1b2c3d4e[ARGS] {OBJECT}"),
        ("pythonic", "<|python_start|>[get_weather(city='Köln')]<|python_end|>"),
        ("pythonic", '[get_weather(\n  city="K\\u00f6ln",\n)]'),
        ("qwen3_coder", "<tool_call><function=get_weather><parameter=city>Köln</parameter></function></tool_call>"),
        ("qwen3_coder", "<function=get_weather>\n<parameter=city>\nKöln\n</parameter>\n</function>"),
        ("qwen3_coder", "<tool_call>\n<function=get_weather>\n<parameter=city>\nKöln\n</function>\n</tool_call>"),
        (
            "deepseek_v31",
            f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{OBJECT}\n```<｜tool▁call▁end｜>",
        ),
        (
            "deepseek_v3",
            f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{OBJECT}<｜tool▁call▁end｜>",
        ),
        ("harmony", f"<|channel|>commentary to=functions.get_weather<|message|>{OBJECT}"),
        ("harmony", f" to=functions.get_weather<|channel|>commentary json<|message|>{OBJECT}<|call|>"),
        ("harmony", f"<|channel|>analysis to=get_weather <|constrain|>json<|message|>{OBJECT}<|call|>"),
    ],
)
def test_a_call_in_another_spelling(name, text):
    result = read(name, text)
    assert result.values == [WEATHER]
    assert result.content.strip() in ("", "<tool_call>")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", "<tool_call>get_weather(city)</tool_call>"),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "now", "arguments": [1]}</tool_call>'),
        ("hermes", '<tool_call>{"name": "now", "arguments": "x"}</tool_call>'),
        ("hermes", '<tool_call>{"name": "now", "arguments": "{\\"a\\": NaN}"}</tool_call>'),
        ("llama3_json", '{"temperature": 20, "name": "get_weather"}'),
        ("llama3_json", '{"name": "Ada", "parameters": {}}'),
        ("llama3_json", 'Use {"name": "now", "parameters": {}} to ask.'),
        ("mistral", "[TOOL_CALLS] none"),
        ("mistral", '[TOOL_CALLS] [{"name": 1}]'),
        ("pythonic", "[1] is a footnote"),
        ("pythonic", "[see(here='x')]"),
        ("pythonic", "[now(open('/etc/passwd'))]"),
        ("pythonic", "[get_weather(city=f'{x}')]"),
        ("pythonic", "[get_weather(city=1e999)]"),
        ("pythonic", "[get_weather(city=" + "[" * 100 + "]" * 100 + ")]"),
        ("qwen3_coder", "<tool_call>\n<function=now\n</tool_call>"),
        ("deepseek_v3", "<｜tool▁calls▁begin｜>now()<｜tool▁calls▁end｜>"),
        ("deepseek_v3", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\nnothing<｜tool▁call▁end｜>"),
    ],
)
def test_what_is_no_call_is_content(name, text):
    result = read(name, text)
    assert result.calls == []
    assert result.content == text


def test_a_later_call_that_is_malformed_leaves_the_earlier_ones():
    result = read("mistral", f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {OBJECT}}}, nonsense]')
    assert result.values == [WEATHER]
    assert result.content == ", nonsense]"


def test_a_call_whose_arguments_turn_out_to_be_no_json_stays_incomplete():
    result = read("hermes", '<tool_call>{"name": "now", "arguments": {"a": 1, b}}</tool_call>')
    assert result.calls == [("now", '{"a": 1, ')]
    assert result.content == "b}}</tool_call>"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", f'<tool_call>\n{{"name": "get_weather", "arguments": {OBJECT}}}\n</tool_c'),
        ("llama3_json", f'<|python_start|>{{"name": "get_weather", "parameters": {OBJECT}}}<|python_'),
        ("mistral", f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {OBJECT}}}'),
        ("pythonic", "<|python_start|>[get_weather(city='Köln')]<|pyth"),
        ("qwen3_coder", "<tool_call>\n<function=get_weather>\n<parameter=city>\nKöln\n</parameter>\n</function>\n</"),
        ("deepseek_v3", f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{OBJECT}\n``"),
        ("deepseek_v31", f"<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{OBJECT}<｜tool▁call▁end｜><｜tool▁calls"),
        ("harmony", f"<|channel|>commentary to=functions.get_weather<|message|>{OBJECT}<|ca"),
    ],
)
def test_what_closes_a_call_may_be_cut_off(name, text):
    result = read(name, text)
    assert (result.values, result.content) == ([WEATHER], "")


class TestPythonic:
    def test_values_are_python_or_json(self):
        text = (
            """[save(lines=['a\\'', "b\\x41\\n\\\\", '''c'"''', "\\ud83c\\udf0d"], force=True, ratio=-1.5e3), """
            """save(lines=(), force=false, ratio=None), save(lines=[], force=null, ratio={'a': [1, {"b": 2,},]})]"""
        )
        assert [arguments for _, arguments in read("pythonic", text).values] == [
            {"lines": ["a'", "bA\n\\", "c'\"", "🌍"], "force": True, "ratio": -1500.0},
            {"lines": [], "force": False, "ratio": None},
            {"lines": [], "force": None, "ratio": {"a": [1, {"b": 2}]}},
        ]


class TestQwen3Coder:
    def call(self, tool, **values):
        inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
        result = read("qwen3_coder", f"<tool_call>\n<function={tool}>\n{inner}</function>\n</tool_call>")
        assert result.content == ""
        return result.values[0][1]

    def test_values_are_what_the_schema_says(self):
        assert self.call("get_weather", city="3", days="3") == {"city": "3", "days": 3}
        assert self.call("save", lines='["a"]', force="True", ratio="null") == {
            "lines": ["a"],
            "force": True,
            "ratio": None,
        }

    def test_a_value_that_is_not_what_the_schema_says_is_a_string(self):
        assert self.call("get_weather", city="x", days="three") == {"city": "x", "days": "three"}

    def test_an_argument_that_nothing_describes_is_a_string(self):
        assert self.call("get_weather", other="3") == {"other": "3"}
        assert self.call("unknown", other="3") == {"other": "3"}

    def test_line_breaks_within_a_value_are_its_own(self):
        assert self.call("get_weather", city="\n  a\n\nb\n") == {"city": "\n  a\n\nb\n"}


class TestHarmony:
    def test_channels(self):
        result = read(
            "harmony",
            "<|channel|>analysis<|message|>They ask for <b>.<|end|>"
            "<|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
            "<|start|>assistant<|channel|>analysis to=python code<|message|>1 + 1<|call|>"
            "<|start|>assistant<|channel|>final<|message|>It rains.<|return|>",
        )
        assert result.reasoning == "They ask for <b>.\n1 + 1"
        assert result.content == "I look.\nIt rains."
        assert result.calls == []

    def test_a_text_that_goes_on_with_the_answer(self):
        assert read("harmony", "rains.<|return|>").content == "rains."

    def test_a_call_without_a_body_has_no_arguments(self):
        assert read("harmony", "<|channel|>commentary to=functions.now<|message|><|call|>").values == [("now", {})]

    def test_a_body_that_is_no_json_is_content(self):
        result = read("harmony", "<|channel|>commentary to=functions.now<|message|>right now<|call|>")
        assert (result.content, result.calls) == ("right now", [])
