"""`[f(a=1), g(b="x")]`: Llama 3.2 and 4, ToolACE, Gemma 3 prompted as its documentation says.

Maybe between `<|python_start|>` and `<|python_end|>`. Values are Python's literals; JSON's true, false and null are
taken too.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from baton.errors import InvalidRequestError
from router.openai.tools.base import Tool
from router.openai.tools.grammar import GrammarBuilder, in_order
from router.openai.tools.incremental import IncrementalParser, Steps
from router.openai.tools.parameters import described_parameters

_MARKERS = ("<|python_start|>", "<|python_tag|>")
_END = "<|python_end|>"
_NAME = re.compile(r"[\w.-]+")
_WORD = re.compile(r"[\w.+-]+")
_WORDS = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}
_ESCAPE = re.compile(r"\\(\n|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{1,3}|.)", re.DOTALL)
_ESCAPED = {"\n": "", "n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v"}
_MAX_DEPTH = 64


class PythonicParser(IncrementalParser):
    """A list of calls after a marker, or at the very beginning of the text.

    Each call is passed on when it ends. A list that nothing marks holds calls only if it names tools of the request.
    """

    def parse(self) -> Steps[None]:
        self.content((yield from self.space()))
        if (yield from self.peek()) == "[":
            yield from self.try_call("", self._list(known_only=True))
        while marker := (yield from self.until(_MARKERS, self.content)):
            yield from self.try_call(marker, self._list(known_only=False))

    @classmethod
    def grammar(cls, builder: GrammarBuilder, tools: Sequence[Tool], *, parallel: bool) -> str:
        call = builder.rule(" | ".join(_call_rule(builder, tool) for tool in tools))
        calls = builder.repeated(call, '", "', parallel=parallel)
        return f'"[" {calls} "]"'

    def _list(self, *, known_only: bool) -> Steps[bool]:
        yield from self.space()
        before = "["
        if not (yield from self.literal(before)):
            return False
        while (yield from self.try_call(before, self._call(known_only))):
            yield from self.space()
            before = ","
            if not (yield from self.literal(before)):
                yield from self.literal("]")
                yield from self.closing(_END)
                return True
        return False

    def _call(self, known_only: bool) -> Steps[bool]:
        yield from self.space()
        name = yield from self.read_while(_NAME)
        if not name or (known_only and name not in self.tools) or not (yield from self.literal("(")):
            return False
        arguments: dict[str, Any] = {}
        yield from self.space()
        while not (yield from self.literal(")")):
            key = yield from self.read_while(_NAME)
            yield from self.space()
            if not key or not (yield from self.literal("=")):
                return False
            read, arguments[key] = yield from self._value(0)
            if not read or not (yield from self._separated(")")):
                return False
        self.begin_call(name)
        self.arguments(json.dumps(arguments, ensure_ascii=False))
        return True

    def _separated(self, end: str) -> Steps[bool]:
        """Reads the comma after an item; True too where the end comes next."""
        yield from self.space()
        comma = yield from self.literal(",")
        yield from self.space()
        return comma or (yield from self.peek()) == end

    def _value(self, depth: int) -> Steps[tuple[bool, Any]]:
        """Reads one literal; (whether it is one, its value)."""
        yield from self.space()
        first = yield from self.peek()
        if first in ("'", '"'):
            return (yield from self._string())
        if first in ("[", "("):
            return (yield from self._sequence("]" if first == "[" else ")", depth))
        if first == "{":
            return (yield from self._dict(depth))
        return _scalar((yield from self.read_while(_WORD)))

    def _sequence(self, end: str, depth: int) -> Steps[tuple[bool, Any]]:
        yield from self.literal("[" if end == "]" else "(")
        values: list[Any] = []
        yield from self.space()
        while not (yield from self.literal(end)):
            read, value = yield from self._value(depth + 1)
            if depth == _MAX_DEPTH or not read or not (yield from self._separated(end)):
                return False, None
            values.append(value)
        return True, values

    def _dict(self, depth: int) -> Steps[tuple[bool, Any]]:
        yield from self.literal("{")
        values: dict[str, Any] = {}
        yield from self.space()
        while not (yield from self.literal("}")):
            read, key = yield from self._string()
            yield from self.space()
            if depth == _MAX_DEPTH or not read or not (yield from self.literal(":")):
                return False, None
            read, values[key] = yield from self._value(depth + 1)
            if not read or not (yield from self._separated("}")):
                return False, None
        return True, values

    def _string(self) -> Steps[tuple[bool, str]]:
        quote = yield from self.peek()
        if quote not in ("'", '"') or not quote:
            return False, ""
        quotes = quote * 3
        if not (yield from self.literal(quotes)):
            quotes = quote
            yield from self.literal(quote)
        pieces: list[str] = []
        while True:
            end = yield from self.until((quotes, "\\"), pieces.append)
            if end is None:
                return False, ""
            if end == quotes:
                return True, _unescape("".join(pieces))
            escaped = yield from self.peek()
            yield from self.literal(escaped)
            pieces.append("\\" + escaped)


def _scalar(word: str) -> tuple[bool, Any]:
    if word in _WORDS:
        return True, _WORDS[word]
    try:
        return True, int(word)
    except ValueError:
        pass
    try:
        number = float(word)
    except ValueError:
        return False, None
    return math.isfinite(number), number


def _unescape(text: str) -> str:
    unescaped = _ESCAPE.sub(_escape, text)
    # JSON writes what lies beyond 16 bits as two escapes.
    return unescaped.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _escape(match: re.Match[str]) -> str:
    code = match[1]
    if code[0] in "xuU" and len(code) > 1:
        number = int(code[1:], 16)
        return chr(number) if number <= 0x10FFFF else match[0]
    if code[0] in "01234567":
        return chr(int(code, 8))
    if code in "\\'\"":
        return code
    return _ESCAPED.get(code, match[0])


def _call_rule(builder: GrammarBuilder, tool: Tool) -> str:
    pieces = []
    for parameter in described_parameters(tool):
        if not parameter.name.isidentifier():
            raise InvalidRequestError("tools", f"{tool.name}: a call in Python's form cannot name {parameter.name!r}")
        pieces.append((f"{builder.literal(parameter.name + '=')} {builder.json(parameter.schema)}", parameter.required))
    arguments = in_order(builder, pieces, '", "')
    return builder.rule(f'{builder.literal(tool.name + "(")} {arguments} ")"')
