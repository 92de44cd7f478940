"""The base of the formats that write a call as a JSON object with its name and its arguments."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from router.openai.tools.base import Tool
from router.openai.tools.grammar import GrammarBuilder
from router.openai.tools.incremental import IncrementalParser, Steps

_ARGUMENT_KEYS = ("arguments", "parameters")
_KEYS = ("name", "type", "id", *_ARGUMENT_KEYS)


class JsonCallParser(IncrementalParser):
    """Reads `{"name": ..., "arguments": ...}`; the arguments are passed on as they come, once the name is known."""

    def call_object(self, *, known_only: bool = False) -> Steps[bool]:
        """Reads one call; False where it is none, or breaks off.

        Args:
            known_only: the object may just as well be an answer in JSON: it is a call only if it names a tool of the
                request and has no keys but those of a call.
        """
        if not (yield from self.literal("{")):
            return False
        name: str | None = None
        held: str | None = None
        begun = False
        while True:
            yield from self.space()
            key_read, key = yield from self._string()
            if not key_read or not (yield from self._colon()) or (known_only and key not in _KEYS):
                return False
            if key == "name":
                read, name = yield from self._string()
                if not read or not name or (known_only and name not in self.tools):
                    return False
            elif key in _ARGUMENT_KEYS and not begun:
                if name is not None:
                    begun = yield from self._stream_arguments(name)
                    if not begun:
                        return False
                else:
                    held = yield from self._hold_arguments()
                    if held is None:
                        return False
            elif not (yield from self.json(_ignore)):
                return False
            yield from self.space()
            if (yield from self.literal("}")):
                break
            if not (yield from self.literal(",")):
                return False
        if name is None:
            return False
        if not begun:
            self.begin_call(name)
            self.arguments("{}" if held is None else held)
        return True

    @staticmethod
    def call_rule(builder: GrammarBuilder, tool: Tool, key: str) -> str:
        """The rule for one call in the form that models are shown: name first, `key` for the arguments."""
        head = json.dumps({"name": tool.name}, ensure_ascii=False)[:-1] + f', "{key}": '
        return builder.rule(f'{builder.literal(head)} {builder.arguments(tool.parameters)} "}}"')

    @classmethod
    def any_call(cls, builder: GrammarBuilder, tools: Sequence[Tool], key: str) -> str:
        """The rule for a call of any of the tools."""
        return builder.rule(" | ".join(cls.call_rule(builder, tool, key) for tool in tools))

    def _stream_arguments(self, name: str) -> Steps[bool]:
        if (yield from self.peek()) == "{":
            self.begin_call(name)
            return (yield from self.json(self.arguments))
        held = yield from self._hold_arguments()
        if held is None:
            return False
        self.begin_call(name)
        self.arguments(held)
        return True

    def _hold_arguments(self) -> Steps[str | None]:
        """Arguments of a call whose name is not known yet, or that are not written as an object; None if not valid."""
        first = yield from self.peek()
        pieces: list[str] = []
        if not (yield from self.json(pieces.append)):
            return None
        if first == "{":
            return "".join(pieces)
        return _object_text("".join(pieces))

    def _string(self) -> Steps[tuple[bool, str]]:
        if (yield from self.peek()) != '"':
            return False, ""
        read, value = yield from self.json_value()
        return read, value if read else ""

    def _colon(self) -> Steps[bool]:
        yield from self.space()
        found = yield from self.literal(":")
        yield from self.space()
        return found


def _object_text(value: str) -> str | None:
    """JSON arguments that are null, or that a model wrote as a string of JSON; None if they are anything else."""
    try:
        decoded: Any = json.loads(value)
        if decoded is None:
            return "{}"
        is_object = isinstance(decoded, str) and isinstance(json.loads(decoded, parse_constant=_refuse), dict)
    except (ValueError, RecursionError):
        return None
    return decoded if is_object else None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _ignore(text: str) -> None:
    """For what is read and means nothing."""
