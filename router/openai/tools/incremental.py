"""The base of all formats: a parser written as a generator that waits for more text wherever it needs some.

A format reads its text top to bottom, as if all of it were there; each `yield` hands the control back to the caller of
`feed`. Every decision rests on characters read, never on where a piece of text ended, so the result does not depend on
how the text was cut.
"""

from __future__ import annotations

import abc
import json
import re
from collections.abc import Callable, Generator, Sequence
from typing import Any, ClassVar, TypeVar

from router.openai.tools.base import ParsedDelta, Tool, ToolCallDelta, random_id
from router.openai.tools.grammar import GrammarBuilder
from router.openai.tools.json_scanner import JsonScanner

_T = TypeVar("_T")
# A part of a parser: waits for text, then gives a result.
Steps = Generator[None, None, _T]

_TRIM_CHARS = 4096
_SPACE = re.compile(r"\s+")


class IncrementalParser(abc.ABC):
    """Keeps the text that was not read yet, and what the text read so far means.

    White space around calls is no content: it is held back until what follows is known.
    """

    needs_special_tokens: ClassVar[bool] = True

    def __init__(self, tools: Sequence[Tool]) -> None:
        self.tools = {tool.name: tool for tool in tools}
        self._buffer = ""
        self._position = 0
        self._ended = False
        # Where the text of a call begins that may still turn out to be none.
        self._tentative: int | None = None
        self._output = _Output()
        self._steps = self.parse()

    @abc.abstractmethod
    def parse(self) -> Steps[None]:
        """Reads the whole text. Ends only when the text does."""

    @classmethod
    @abc.abstractmethod
    def grammar(cls, builder: GrammarBuilder, tools: Sequence[Tool], *, parallel: bool) -> str:
        """See `ToolParser.grammar`."""

    def feed(self, text: str) -> ParsedDelta:
        """See `ToolParser.feed`."""
        # With no second reference to it the buffer grows in place.
        buffer, self._buffer = self._buffer, ""
        num_read = self._position if self._tentative is None else self._tentative
        if num_read == len(buffer) or num_read > _TRIM_CHARS:
            buffer = buffer[num_read:]
            self._position -= num_read
            self._tentative = None if self._tentative is None else 0
        buffer += text
        self._buffer = buffer
        next(self._steps, None)
        return self._output.take()

    def finish(self) -> ParsedDelta:
        """See `ToolParser.finish`."""
        self._ended = True
        for _ in self._steps:
            raise AssertionError("a parser waits for text after its end")
        self._output.end()
        return self._output.take()

    # Reading ---------------------------------------------------------------------------------------------------

    def peek(self) -> Steps[str]:
        """The next character, "" at the end; it stays unread."""
        while self._position == len(self._buffer) and not self._ended:
            yield
        return self._buffer[self._position : self._position + 1]

    def literal(self, text: str) -> Steps[bool]:
        """Reads this text if it comes next."""
        while True:
            rest = self._buffer[self._position : self._position + len(text)]
            if rest == text:
                self._position += len(text)
                return True
            if self._ended or not text.startswith(rest):
                return False
            yield

    def closing(self, text: str) -> Steps[bool]:
        """Reads what closes a call if it comes next, or as much of it as comes before the text's end."""
        if (yield from self.literal(text)):
            return True
        rest = self._buffer[self._position :]
        if not self._ended or not rest or not text.startswith(rest):
            return False
        self._position = len(self._buffer)
        return True

    def space(self) -> Steps[str]:
        """Reads white space, maybe none."""
        return (yield from self.read_while(_SPACE))

    def read_while(self, pattern: re.Pattern[str]) -> Steps[str]:
        """Reads as long a run as comes; the pattern must match every part of a run too, as `[a-z]+` does."""
        read = []
        while True:
            if run := pattern.match(self._buffer, self._position):
                read.append(run.group())
                self._position = run.end()
            if self._position < len(self._buffer) or self._ended:
                return "".join(read)
            yield

    def until(self, ends: Sequence[str], emit: Callable[[str], None]) -> Steps[str | None]:
        """Reads and emits text up to the first of these strings, which is read too and returned; None at the end.

        None of the strings may begin with another one.
        """
        pattern = re.compile("|".join(map(re.escape, ends)))
        while True:
            if found := pattern.search(self._buffer, self._position):
                self._emit_up_to(found.start(), emit)
                self._position = found.end()
                return found.group()
            held = 0 if self._ended else _begun(self._buffer, self._position, ends)
            self._emit_up_to(len(self._buffer) - held, emit)
            if self._ended:
                return None
            yield

    def json(self, emit: Callable[[str], None]) -> Steps[bool]:
        """Reads and emits one JSON value as it comes; False where it breaks off, the rest unread."""
        scanner = JsonScanner()
        while True:
            text, self._position = scanner.scan(self._buffer, self._position)
            if text:
                emit(text)
            if scanner.done:
                return True
            if scanner.failed:
                return False
            if self._ended:
                return scanner.finish()
            yield

    def json_value(self) -> Steps[tuple[bool, Any]]:
        """Reads one JSON value; (whether it is one, what it means)."""
        pieces: list[str] = []
        if not (yield from self.json(pieces.append)):
            return False, None
        try:
            return True, json.loads("".join(pieces))
        except ValueError:  # a number of more digits than Python reads
            return False, None

    # Meaning ---------------------------------------------------------------------------------------------------

    def try_call(self, marker: str, steps: Steps[bool]) -> Steps[bool]:
        """Reads what may be a call and began with the marker that was just read; if it is none it is content.

        What was said of a call before it broke stays said; then only the text after that is content. Within a tentative
        call this is a part of it.
        """
        nested = self._tentative is not None
        if not nested:
            self._tentative = self._position - len(marker)
        whole = yield from steps
        if not nested and self._tentative is not None:
            if not whole:
                self.content(self._buffer[self._tentative : self._position])
            self._tentative = None
        return whole

    def content(self, text: str) -> None:
        """Text for the client's user."""
        self._output.content(text)

    def reasoning(self, text: str) -> None:
        """Text that the model wrote for itself."""
        self._output.reasoning(text)

    def begin_call(self, name: str) -> None:
        """A call, for certain: its text cannot become content any more."""
        self._tentative = None
        self._output.begin_call(self.new_id(), name)

    def arguments(self, text: str) -> None:
        """The next piece of the JSON text of the last call's arguments."""
        self._output.arguments(text)

    def new_id(self) -> str:
        """An id for the next call, as OpenAI's look."""
        return f"call_{random_id(24)}"

    def _emit_up_to(self, end: int, emit: Callable[[str], None]) -> None:
        if end > self._position:
            text = self._buffer[self._position : end]
            self._position = end
            emit(text)


class _Output:
    """Collects what `feed` will return."""

    def __init__(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[ToolCallDelta] = []
        self._num_calls = 0
        self._space = ""
        # The last thing that was said is a call, so white space alone says nothing.
        self._after_call = False

    def content(self, text: str) -> None:
        text = self._space + text
        said = text.rstrip()
        self._space = text[len(said) :]
        if said:
            self._content.append(said)
            self._after_call = False

    def reasoning(self, text: str) -> None:
        self._reasoning.append(text)

    def begin_call(self, call_id: str, name: str) -> None:
        self._space = ""
        self._after_call = True
        self._calls.append(ToolCallDelta(self._num_calls, call_id, name))
        self._num_calls += 1

    def arguments(self, text: str) -> None:
        index = self._num_calls - 1
        if self._calls and self._calls[-1].index == index:
            last = self._calls.pop()
            self._calls.append(ToolCallDelta(index, last.id, last.name, last.arguments + text))
        else:
            self._calls.append(ToolCallDelta(index, arguments=text))

    def end(self) -> None:
        if self._space and not self._after_call:
            self._content.append(self._space)
        self._space = ""

    def take(self) -> ParsedDelta:
        delta = ParsedDelta("".join(self._content), "".join(self._reasoning), tuple(self._calls))
        self._content, self._reasoning, self._calls = [], [], []
        return delta


def _begun(text: str, start: int, markers: Sequence[str]) -> int:
    """How many characters at the end of the text may be the beginning of a marker."""
    longest = min(max(map(len, markers)) - 1, len(text) - start)
    for num_chars in range(longest, 0, -1):
        end = text[len(text) - num_chars :]
        if any(marker.startswith(end) for marker in markers):
            return num_chars
    return 0
