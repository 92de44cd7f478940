"""Reads an OpenAI-compatible stream into an outcome, with as little work for each event as honest counting allows."""

from __future__ import annotations

import bisect
import json
from typing import Any

from baton.errors import InternalError
from bench.load.outcome import Outcome

# Which of the events without text are the likeliest tokens: one in the middle only begins a character; some servers
# end a choice with an event of its own; and most open a chat with one that has the role alone.
_IN_THE_MIDDLE, _AT_THE_END, _OPENING = range(3)


class EventReader:
    """The events of one request, as bytes come in.

    An event has as many tokens as it tells (by a usage of its own, or by token ids), else one if it has text. Whether
    one without text was a token only the usage in the end can say: then as many of them count as are missing.
    """

    def __init__(self, outcome: Outcome, *, keeps_answer: bool) -> None:
        """`keeps_answer`: text and token ids are wanted, since another turn follows."""
        self._outcome = outcome
        self._keeps_answer = keeps_answer
        self._rest = b""
        self._num_counted = 0
        self._without_text: list[tuple[int, float]] = []
        self.is_done = False

    def feed(self, chunk: bytes, at_s: float) -> None:
        """Takes what has arrived.

        Raises:
            InternalError: the server sent an error, or what is no event.
        """
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._read(line[5:].strip(), at_s)

    def finish(self) -> None:
        """The stream is over: counts the events without text that were tokens.

        Raises:
            InternalError: it broke off.
        """
        if not self.is_done:
            raise InternalError("the stream ended without [DONE]")
        outcome = self._outcome
        missing = (outcome.completion_tokens or 0) - self._num_counted
        for _, at_s in sorted(self._without_text)[: max(missing, 0)]:
            index = bisect.bisect(outcome.token_times_s, at_s)
            outcome.token_times_s.insert(index, at_s)
            outcome.token_counts.insert(index, 1)

    def _read(self, data: bytes, at_s: float) -> None:
        if data == b"[DONE]":
            self.is_done = True
            return
        try:
            event: dict[str, Any] = json.loads(data)
            if (usage := event.get("usage")) is not None:
                self._take_usage(usage)
            if choices := event.get("choices"):
                self._take_choice(choices[0], usage, at_s)
            elif "error" in event:
                raise InternalError(str(event["error"].get("message", event["error"])))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InternalError(f"an event that is none: {data[:80]!r}") from error

    def _take_usage(self, usage: dict[str, Any]) -> None:
        outcome = self._outcome
        outcome.prompt_tokens = usage["prompt_tokens"]
        outcome.completion_tokens = usage["completion_tokens"]
        outcome.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")

    def _take_choice(self, choice: dict[str, Any], usage: dict[str, Any] | None, at_s: float) -> None:
        delta = choice.get("delta")
        text = choice.get("text") if delta is None else _text_of(delta)
        token_ids = choice.get("token_ids")
        if usage is not None:
            count = usage["completion_tokens"] - self._num_counted
        elif token_ids is not None:
            count = len(token_ids)
        else:
            count = 1 if text else 0
            if not text:
                opens = delta is not None and "role" in delta
                ends = choice.get("finish_reason") is not None
                self._without_text.append((_OPENING if opens else _AT_THE_END if ends else _IN_THE_MIDDLE, at_s))
        if count > 0:
            self._num_counted += count
            self._outcome.add_tokens(at_s, count)
        if self._keeps_answer:
            self._outcome.text += text or ""
            self._outcome.token_ids += token_ids or ()


def _text_of(delta: dict[str, Any]) -> Any:
    """Whatever a delta of a chat brings: the answer, reasoning, or a tool call."""
    return delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or delta.get("tool_calls")
