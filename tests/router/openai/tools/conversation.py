"""What the tests of all formats share: tools, the calls that a text should mean, and how each format writes them."""

import dataclasses
import json
from typing import Any

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a place.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "units": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                },
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "save",
            "parameters": {
                "type": "object",
                "properties": {
                    "lines": {"type": "array", "items": {"type": "string"}},
                    "force": {"type": "boolean"},
                    "ratio": {"type": ["number", "null"]},
                },
                "required": ["lines", "force"],
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]

# Calls as (name, arguments): one, several, hard strings, none.
CALLS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "one": [("get_weather", {"city": "Köln", "days": 3})],
    "two": [("get_weather", {"city": "São Paulo"}), ("save", {"lines": ["a", "b"], "force": True, "ratio": None})],
    "hard": [("get_weather", {"city": "a \"b\"\\ {[(<x>)]} \n\t'c' </tool 🌍"}), ("now", {})],
    "empty": [("now", {})],
}


@dataclasses.dataclass
class Result:
    """All that a parser said of one text."""

    content: str
    reasoning: str
    calls: list[tuple[str, str]]

    @property
    def values(self):
        return [(name, json.loads(arguments)) for name, arguments in self.calls]


def parse(parser, pieces):
    """Feeds the pieces and adds up the deltas."""
    content = reasoning = ""
    calls = []
    for delta in [*(parser.feed(piece) for piece in pieces), parser.finish()]:
        content += delta.content
        reasoning += delta.reasoning
        for call in delta.tool_calls:
            if call.id is not None:
                assert call.index == len(calls)
                assert call.name
                calls.append([call.name, ""])
            else:
                assert call.name is None
            calls[call.index][1] += call.arguments
    return Result(content, reasoning, [(name, arguments) for name, arguments in calls])


def _json(value):
    return json.dumps(value, ensure_ascii=False)


def _objects(calls, key="arguments"):
    return [f'{{"name": "{name}", "{key}": {_json(arguments)}}}' for name, arguments in calls]


def _hermes(calls):
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in _objects(calls))


def _pythonic(calls):
    return "[" + ", ".join(f"{n}({', '.join(f'{k}={v!r}' for k, v in a.items())})" for n, a in calls) + "]"


def _qwen3_coder(calls):
    text = ""
    for name, arguments in calls:
        values = {k: v if isinstance(v, str) else _json(v) for k, v in arguments.items()}
        inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
        text += f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>\n"
    return text


def _deepseek_v3(calls):
    inner = "\n".join(
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{n}\n```json\n{_json(a)}\n```<｜tool▁call▁end｜>" for n, a in calls
    )
    return f"<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"


def _deepseek_v31(calls):
    inner = "".join(f"<｜tool▁call▁begin｜>{n}<｜tool▁sep｜>{_json(a)}<｜tool▁call▁end｜>" for n, a in calls)
    return f"<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"


def _harmony(calls):
    return "<|start|>assistant".join(
        f"<|channel|>commentary to=functions.{n} <|constrain|>json<|message|>{_json(a)}<|call|>" for n, a in calls
    )


# How a model of each format writes calls, and so what its parser must read.
WRITERS = {
    "hermes": _hermes,
    "llama3_json": lambda calls: "; ".join(_objects(calls, "parameters")),
    "mistral": lambda calls: f"[TOOL_CALLS] [{', '.join(_objects(calls))}]",
    "pythonic": _pythonic,
    "qwen3_coder": _qwen3_coder,
    "deepseek_v3": _deepseek_v3,
    "deepseek_v31": _deepseek_v31,
    "harmony": _harmony,
}

# Texts that every parser must survive: each format's markers, whole, broken and out of place.
FRAGMENTS = [
    *(writer(calls) for writer in WRITERS.values() for calls in CALLS.values()),
    *("<tool_call>", "</tool_call>", "<function=f>", "<parameter=p>", "</parameter>", "</function>", "[TOOL_CALLS]"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "```json\n", "```"),
    *(
        "<|channel|>",
        "<|message|>",
        "<|start|>assistant",
        "<|end|>",
        "analysis",
        "final",
        " to=functions.f",
        "<|call|>",
    ),
    *("<|python_tag|>", "<|python_start|>", "<|python_end|>", "[ARGS]", "[CALL_ID]", "<think>", "</think>"),
    *(
        '{"name": "now"',
        ', "arguments": ',
        '"{\\"a\\": 1}"',
        "{}",
        "[",
        "]",
        "}",
        "(",
        ")",
        "get_weather(",
        "city=",
        "-1.5e3",
    ),
    *(" ", "\n\n", "text", ",", ";", '"', "'", "\\", "\x00", "é🌍", "null", "tru", "[[[[", "<", "function"),
]
