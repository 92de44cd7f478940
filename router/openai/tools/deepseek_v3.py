"""DeepSeek's calls, between tokens of their own (written here with plain bars and spaces).

V3 and R1 write `<|tool call begin|>function<|tool sep|>NAME`, a line break and the arguments in a JSON code fence; V3.1
writes `<|tool call begin|>NAME<|tool sep|>{...}`. Both end with `<|tool call end|>`, and all calls stand between
`<|tool calls begin|>` and `<|tool calls end|>`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from router.openai.tools.base import Tool
from router.openai.tools.grammar import GrammarBuilder
from router.openai.tools.incremental import IncrementalParser, Steps

_CALLS_BEGIN = "<｜tool▁calls▁begin｜>"
_CALLS_END = "<｜tool▁calls▁end｜>"
_BEGIN = "<｜tool▁call▁begin｜>"
_END = "<｜tool▁call▁end｜>"
_SEPARATOR = "<｜tool▁sep｜>"
_NAME = re.compile(r"[\w.:-]+")
_FENCE = "```"


class DeepSeekV3Parser(IncrementalParser):
    """Reads both forms, whichever the model writes; the outer tokens may be missing."""

    def parse(self) -> Steps[None]:
        while marker := (yield from self.until((_CALLS_BEGIN, _BEGIN), self.content)):
            yield from self.try_call(marker, self._calls(marker))

    @classmethod
    def grammar(cls, builder: GrammarBuilder, tools: Sequence[Tool], *, parallel: bool) -> str:
        calls = builder.rule(" | ".join(cls.call_rule(builder, tool) for tool in tools))
        call = builder.rule(f"{builder.literal(_BEGIN)} {calls} {builder.literal(_END)}")
        # The models break the line between two calls.
        inner = builder.repeated(call, r"/\n?/", parallel=parallel)
        return f"{builder.literal(_CALLS_BEGIN)} {inner} {builder.literal(_CALLS_END)}"

    @classmethod
    def call_rule(cls, builder: GrammarBuilder, tool: Tool) -> str:
        """The rule for what stands between the tokens of one call."""
        head = builder.literal(f"{tool.name}\n```json\n")
        separator = builder.literal(_SEPARATOR)
        return builder.rule(f'"function" {separator} {head} {builder.arguments(tool.parameters)} "\\n```"')

    def _calls(self, marker: str) -> Steps[bool]:
        if marker == _CALLS_BEGIN:
            yield from self.space()
            if not (yield from self.literal(_BEGIN)):
                return False
        while True:
            if not (yield from self.try_call(_BEGIN, self._call())):
                return False
            after = yield from self.space()
            if (yield from self.closing(_CALLS_END)):
                return True
            if not (yield from self.literal(_BEGIN)):
                self.content(after)
                return True

    def _call(self) -> Steps[bool]:
        yield from self.space()
        name = yield from self.read_while(_NAME)
        if not (yield from self.literal(_SEPARATOR)):
            return False
        yield from self.space()
        if (yield from self.peek()) != "{":
            # What stood before the separator was the kind of the tool.
            name = yield from self.read_while(_NAME)
            yield from self.space()
        fenced = yield from self.literal(_FENCE)
        if fenced:
            yield from self.literal("json")
            yield from self.space()
        if not name or (yield from self.peek()) != "{":
            return False
        self.begin_call(name)
        if not (yield from self.json(self.arguments)):
            return False
        yield from self.space()
        if fenced:
            yield from self.closing(_FENCE)
            yield from self.space()
        yield from self.closing(_END)
        return True


class DeepSeekV31Parser(DeepSeekV3Parser):
    """The same parser, for models that are made to write the shorter form."""

    @classmethod
    def call_rule(cls, builder: GrammarBuilder, tool: Tool) -> str:
        return builder.rule(
            f"{builder.literal(tool.name)} {builder.literal(_SEPARATOR)} {builder.arguments(tool.parameters)}"
        )
