"""`[TOOL_CALLS]` and then either `[{"name": "f", "arguments": {...}}]` or `f{...}`: Mistral's models.

The array is that of the tokenizers up to v7. Later ones write each call after a `[TOOL_CALLS]` of its own: name, maybe
`[CALL_ID]` and an id, maybe `[ARGS]`, arguments.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from router.openai.tools.base import Tool, random_id
from router.openai.tools.grammar import GrammarBuilder
from router.openai.tools.incremental import Steps
from router.openai.tools.json_call import JsonCallParser

_MARKER = "[TOOL_CALLS]"
_ID = "[CALL_ID]"
_ARGS = "[ARGS]"
_NAME = re.compile(r"[\w.:-]+")
_WORD = re.compile(r"\w+")


class MistralParser(JsonCallParser):
    """Calls anywhere in the text. Their ids have the nine letters and digits that Mistral's own templates insist on."""

    def parse(self) -> Steps[None]:
        while (yield from self.until((_MARKER,), self.content)):
            yield from self.try_call(_MARKER, self._calls())

    def new_id(self) -> str:
        return random_id(9)

    @classmethod
    def grammar(cls, builder: GrammarBuilder, tools: Sequence[Tool], *, parallel: bool) -> str:
        marker = builder.literal(_MARKER)
        if builder.is_special(_ARGS):
            args = builder.literal(_ARGS)
            named = [f"{builder.literal(t.name)} {args} {builder.arguments(t.parameters)}" for t in tools]
            return builder.repeated(builder.rule(f"{marker} ({' | '.join(named)})"), "", parallel=parallel)
        calls = builder.repeated(cls.any_call(builder, tools, "arguments"), '", "', parallel=parallel)
        return f'{marker} /[ ]?/ "[" {calls} "]"'

    def _calls(self) -> Steps[bool]:
        yield from self.space()
        first = yield from self.peek()
        if first == "[":
            return (yield from self._array())
        if first == "{":
            return (yield from self.call_object())
        return (yield from self._named())

    def _array(self) -> Steps[bool]:
        before = "["
        yield from self.literal(before)
        while (yield from self.try_call(before, self._element())):
            yield from self.space()
            before = ","
            if not (yield from self.literal(before)):
                # An array that the text's end leaves open is whole enough.
                yield from self.literal("]")
                return True
        return False

    def _element(self) -> Steps[bool]:
        yield from self.space()
        return (yield from self.call_object())

    def _named(self) -> Steps[bool]:
        name = yield from self.read_while(_NAME)
        if (yield from self.literal(_ID)):
            yield from self.read_while(_WORD)
        yield from self.literal(_ARGS)
        yield from self.space()
        if not name or (yield from self.peek()) != "{":
            return False
        self.begin_call(name)
        return (yield from self.json(self.arguments))
