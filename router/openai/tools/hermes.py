"""`<tool_call>{"name": "f", "arguments": {...}}</tool_call>`: Hermes 2 Pro and later, Qwen 2.5, QwQ, Qwen 3."""

from __future__ import annotations

from collections.abc import Sequence

from router.openai.tools.base import Tool
from router.openai.tools.grammar import GrammarBuilder
from router.openai.tools.incremental import Steps
from router.openai.tools.json_call import JsonCallParser

_BEGIN = "<tool_call>"
_END = "</tool_call>"


class HermesParser(JsonCallParser):
    """Calls anywhere in the text; a missing end tag is forgiven."""

    def parse(self) -> Steps[None]:
        while (yield from self.until((_BEGIN,), self.content)):
            yield from self.try_call(_BEGIN, self._call())

    @classmethod
    def grammar(cls, builder: GrammarBuilder, tools: Sequence[Tool], *, parallel: bool) -> str:
        begin, end = builder.literal(_BEGIN), builder.literal(_END)
        call = builder.rule(rf'{begin} "\n" {cls.any_call(builder, tools, "arguments")} "\n" {end}')
        return builder.repeated(call, r'"\n"', parallel=parallel)

    def _call(self) -> Steps[bool]:
        yield from self.space()
        if not (yield from self.call_object()):
            return False
        after = yield from self.space()
        if not (yield from self.closing(_END)):
            self.content(after)
        return True
