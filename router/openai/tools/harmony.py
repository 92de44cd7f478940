"""gpt-oss: messages on the channels analysis, commentary and final; calls are messages to a function.

https://github.com/openai/harmony/blob/main/docs/format.md

The prompt ends with `<|start|>assistant`, so the text begins within the first message's header.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from router.openai.tools.base import Tool
from router.openai.tools.grammar import GrammarBuilder
from router.openai.tools.incremental import IncrementalParser, Steps

_START = "<|start|>"
_CHANNEL = "<|channel|>"
_MESSAGE = "<|message|>"
_CONSTRAIN = "<|constrain|>"
_END = "<|end|>"
_CALL = "<|call|>"
_RETURN = "<|return|>"
_ENDS = (_END, _CALL, _RETURN, _START, _CHANNEL)
# What the text may begin with, if it does begin within a header.
_HEADS = (_CHANNEL, _START, _MESSAGE, " to=")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_CHANNEL_NAME = re.compile(re.escape(_CHANNEL) + r"\s*(\w+)")
_NAMESPACE = "functions."


class HarmonyParser(IncrementalParser):
    """Gives the reasoning too: what is on the analysis channel. Calls of built-in tools count as reasoning."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        super().__init__(tools)
        self._reasoned = False
        self._answered = False

    def parse(self) -> Steps[None]:
        head = yield from self._first_head()
        if head is None:
            head = yield from self._answer()
        while head is not None:
            if head in (_END, _CALL, _RETURN):
                head = yield from self.until((_START, _CHANNEL), _ignore)
                continue
            header = [head]
            if head != _MESSAGE and (yield from self.until((_MESSAGE,), header.append)) is None:
                return
            head = yield from self._message("".join(header))

    @classmethod
    def grammar(cls, builder: GrammarBuilder, tools: Sequence[Tool], *, parallel: bool) -> str:
        channel, message = builder.literal(_CHANNEL), builder.literal(_MESSAGE)
        analysis = f'{channel} "analysis" {message} {builder.text_until(_END)} {builder.literal(_START)} "assistant"'
        json_follows = f'{builder.literal(_CONSTRAIN)} "json" {message}'
        calls = [
            f"{builder.literal(f'commentary to={_NAMESPACE}{tool.name} ')} {json_follows} "
            f"{builder.arguments(tool.parameters)}"
            for tool in tools
        ]
        # A call ends the model's turn, so there is never a second one.
        return f"({builder.rule(analysis)})? {channel} ({' | '.join(calls)})"

    def _first_head(self) -> Steps[str | None]:
        for head in _HEADS:
            if (yield from self.literal(head)):
                return head
        return None

    def _message(self, header: str) -> Steps[str | None]:
        """Reads a message's body and what ends it."""
        channel = _CHANNEL_NAME.search(header)
        recipient = _RECIPIENT.search(header)
        if recipient is not None:
            name = recipient[1].removeprefix(_NAMESPACE)
            if name in self.tools or (name and recipient[1].startswith(_NAMESPACE)):
                return (yield from self._call(name))
            return (yield from self._reason())
        if channel is not None and channel[1] == "analysis":
            return (yield from self._reason())
        return (yield from self._answer())

    def _reason(self) -> Steps[str | None]:
        if self._reasoned:
            self.reasoning("\n")
        self._reasoned = True
        return (yield from self.until(_ENDS, self.reasoning))

    def _answer(self) -> Steps[str | None]:
        if self._answered:
            self.content("\n")
        self._answered = True
        return (yield from self.until(_ENDS, self.content))

    def _call(self, name: str) -> Steps[str | None]:
        yield from self.space()
        if (yield from self.peek()) == "{":
            self.begin_call(name)
            whole = yield from self.json(self.arguments)
            return (yield from self.until(_ENDS, _ignore if whole else self.content))
        text: list[str] = []
        end = yield from self.until(_ENDS, text.append)
        if end is not None and not text:
            self.begin_call(name)
            self.arguments("{}")
        else:
            self.content("".join(text))
        return end


def _ignore(text: str) -> None:
    """For what is read and means nothing."""
