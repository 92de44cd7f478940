"""`{"name": "f", "parameters": {...}}`, alone or after `<|python_tag|>`: Llama 3.1 and 3.2, and Llama 4 so prompted."""

from __future__ import annotations

from collections.abc import Sequence

from router.openai.tools.base import Tool
from router.openai.tools.grammar import GrammarBuilder
from router.openai.tools.incremental import Steps
from router.openai.tools.json_call import JsonCallParser

_MARKERS = ("<|python_tag|>", "<|python_start|>")
_END = "<|python_end|>"


class Llama3JsonParser(JsonCallParser):
    """Calls after a marker, or at the very beginning of the text; more of them after ";" or ",".

    An object that nothing marks is a call only if it names a tool of the request.
    """

    def parse(self) -> Steps[None]:
        self.content((yield from self.space()))
        if (yield from self.peek()) == "{":
            yield from self._calls("", known_only=True)
        while marker := (yield from self.until(_MARKERS, self.content)):
            yield from self._calls(marker, known_only=False)

    @classmethod
    def grammar(cls, builder: GrammarBuilder, tools: Sequence[Tool], *, parallel: bool) -> str:
        return builder.repeated(cls.any_call(builder, tools, "parameters"), '"; "', parallel=parallel)

    def _calls(self, marker: str, *, known_only: bool) -> Steps[None]:
        whole = yield from self.try_call(marker, self._call("", known_only))
        while whole:
            after = yield from self.space()
            if (yield from self.closing(_END)):
                return
            self.content(after)
            separator = yield from self.peek()
            if not separator or separator not in "{;,":
                return
            whole = yield from self.try_call("", self._call(separator, known_only))

    def _call(self, separator: str, known_only: bool) -> Steps[bool]:
        if separator != "{":
            yield from self.literal(separator)
        yield from self.space()
        return (yield from self.call_object(known_only=known_only))
