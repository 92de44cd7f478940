"""`<tool_call><function=f><parameter=p>value</parameter></function></tool_call>`: Qwen3-Coder and later Qwen models.

Values are not quoted: what they are is told by the tool's schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from router.openai.tools.base import Tool
from router.openai.tools.grammar import GrammarBuilder, in_order
from router.openai.tools.incremental import IncrementalParser, Steps
from router.openai.tools.parameters import Parameter, described_parameters, json_type, value_types

_BEGIN = "<tool_call>"
_END = "</tool_call>"
_FUNCTION = "<function="
_FUNCTION_END = "</function>"
_PARAMETER = "<parameter="
_PARAMETER_END = "</parameter>"
_NAME = re.compile(r"[^<>\s]+")
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}


class Qwen3CoderParser(IncrementalParser):
    """Calls anywhere in the text; the outer tags and a parameter's end tag may be missing.

    Strings are passed on as they come, other values when they end. A value that is not what the schema says is passed
    on as a string.
    """

    needs_special_tokens = False

    def parse(self) -> Steps[None]:
        while marker := (yield from self.until((_BEGIN, _FUNCTION), self.content)):
            yield from self.try_call(marker, self._call(marker))

    @classmethod
    def grammar(cls, builder: GrammarBuilder, tools: Sequence[Tool], *, parallel: bool) -> str:
        functions = builder.rule(" | ".join(_function_rule(builder, tool) for tool in tools))
        call = builder.rule(rf'{builder.literal(_BEGIN)} "\n" {functions} "\n" {builder.literal(_END)}')
        return builder.repeated(call, r'"\n"', parallel=parallel)

    def _call(self, marker: str) -> Steps[bool]:
        if marker == _BEGIN:
            yield from self.space()
            if not (yield from self.literal(_FUNCTION)):
                return False
        name = yield from self.read_while(_NAME)
        if not name or not (yield from self.literal(">")):
            return False
        yield from self.space()
        tag = yield from self._tag()
        if tag is None:
            return False
        self.begin_call(name)
        tool = self.tools.get(name, Tool(name, {}))
        opening = "{"
        while tag == _PARAMETER:
            parameter = yield from self.read_while(_NAME)
            if not parameter or not (yield from self.literal(">")):
                return False
            self.arguments(f"{opening}{json.dumps(parameter, ensure_ascii=False)}: ")
            opening = ", "
            tag = yield from self._value(tool.properties.get(parameter))
            if tag == _PARAMETER_END:
                yield from self.space()
                tag = yield from self._tag()
        if tag is None:
            return False
        self.arguments("{}" if opening == "{" else "}")
        after = yield from self.space()
        if not (yield from self.closing(_END)):
            self.content(after)
        return True

    def _tag(self) -> Steps[str | None]:
        """Reads the beginning of the next parameter or the end of the function; None where something else comes."""
        for tag in (_PARAMETER, _FUNCTION_END):
            if (yield from self.literal(tag)):
                return tag
        return None

    def _value(self, schema: Any) -> Steps[str | None]:
        """Reads a value and says it in JSON; returns the tag that ended it, None where the text ended first."""
        ends = (_PARAMETER_END, _PARAMETER, _FUNCTION_END)
        yield from self.literal("\n")
        types = value_types(schema)
        if types == {"string"} or (not types and not _refers(schema)):
            self.arguments('"')
            sink = _StringSink(self)
            end = yield from self.until(ends, sink.take)
            if end is not None:
                self.arguments('"')
            return end
        pieces: list[str] = []
        end = yield from self.until(ends, pieces.append)
        if end is not None:
            self.arguments(_to_json("".join(pieces), types))
        return end


class _StringSink:
    """Passes a value on as the inside of a JSON string, all but the line break before its end tag."""

    def __init__(self, parser: Qwen3CoderParser) -> None:
        self._parser = parser
        self._held = ""

    def take(self, text: str) -> None:
        text = self._held + text
        self._held = "\n" if text.endswith("\n") else ""
        self._parser.arguments(json.dumps(text.removesuffix("\n"), ensure_ascii=False)[1:-1])


def _refers(schema: Any) -> bool:
    """The schema tells the type in some way that is not followed here."""
    return isinstance(schema, dict) and any(key in schema for key in ("$ref", "anyOf", "oneOf", "allOf"))


def _to_json(text: str, types: set[str]) -> str:
    """The value as JSON text: as it is written where that is JSON of a type that is allowed, else as a string."""
    text = text.removesuffix("\n")
    written = _PYTHON_WORDS.get(text.strip(), text.strip())
    try:
        value = json.loads(written, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    found = json_type(value)
    if "string" in types and found not in types and not (found == "integer" and "number" in types):
        return json.dumps(text, ensure_ascii=False)
    return written


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _function_rule(builder: GrammarBuilder, tool: Tool) -> str:
    pieces = [(_parameter_rule(builder, parameter), parameter.required) for parameter in described_parameters(tool)]
    head = builder.literal(f"{_FUNCTION}{tool.name}>\n")
    values = in_order(builder, pieces, '""')
    return builder.rule(f"{head} {values} {builder.literal(_FUNCTION_END)}")


def _parameter_rule(builder: GrammarBuilder, parameter: Parameter) -> str:
    head = builder.literal(f"{_PARAMETER}{parameter.name}>\n")
    end = f"\n{_PARAMETER_END}\n"
    if value_types(parameter.schema) != {"string"}:
        return f"{head} {builder.json(parameter.schema)} {builder.literal(end)}"
    choices = parameter.schema.get("enum") or ([parameter.schema["const"]] if "const" in parameter.schema else [])
    if choices:
        return f"{head} ({' | '.join(builder.literal(choice) for choice in choices)}) {builder.literal(end)}"
    return f"{head} {builder.text_until(end, without=(_PARAMETER, _FUNCTION_END))}"
