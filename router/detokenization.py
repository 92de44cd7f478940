"""From token ids to text, one token at a time: characters that are whole, and nothing of a stop string.

One pair of these for each choice of a request; they outlive attempts. Called on the event loop: a token costs
microseconds.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character is at most 4 bytes, so at most 4 tokens; more undecodable ones than this are garbage, and sent as such.
_MAX_HELD_TOKENS = 64
_CONTEXT_TOKENS = 6

Decode = Callable[[Sequence[int]], str]


class Detokenizer(Protocol):
    """Decodes a growing sequence of tokens; the pieces add up to the text of the whole."""

    def push(self, token_id: int) -> str:
        """The text that this token completes, often just its own."""
        ...

    def flush(self) -> str:
        """The rest, where the sequence ends here."""
        ...


class ByteDetokenizer:
    """For vocabularies whose tokens are bytes, which read the same whatever stands before them.

    Args:
        pieces: the bytes of each token id; those that are missing have none.
        context: tokens before the first one; a character that they begin comes out whole with the one that ends it.
    """

    __slots__ = ("_began_in_context", "_held", "_pieces")

    def __init__(self, pieces: Mapping[int, bytes], context: Sequence[int] = ()) -> None:
        self._pieces = pieces
        # Bytes that begin a character.
        self._held = b""
        self._began_in_context = False
        for token_id in context[-_CONTEXT_TOKENS:]:
            self.push(token_id)
        self._began_in_context = bool(self._held)

    def push(self, token_id: int) -> str:
        data = self._held + self._pieces.get(token_id, b"")
        text, num_read = codecs.utf_8_decode(data, "replace")
        self._held = data[num_read:]
        return self._own(text) if self._began_in_context and text else text

    def flush(self) -> str:
        held, self._held = self._held, b""
        text = held.decode("utf-8", "replace")
        return self._own(text) if self._began_in_context else text

    def _own(self, text: str) -> str:
        """The first text after a context that ends inside a character, without what that left if nothing completes
        it."""
        self._began_in_context = False
        return text.removeprefix(_REPLACEMENT)


class WindowDetokenizer:
    """For all other vocabularies.

    Decoders look at neighbours (leading spaces, runs of byte tokens), so a token is decoded after the window of tokens
    before it, as in vLLM and text-generation-inference. Text that ends in an incomplete UTF-8 sequence is held back.

    Args:
        decode: from token ids to text, special tokens left out.
        context: tokens before the first one, as many as decoders look at; their text is not returned.
    """

    def __init__(self, decode: Decode, context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(context[-_CONTEXT_TOKENS:])
        # The window's tokens whose text was returned, and how long that text is.
        self._num_read = len(self._window)
        self._read_chars = len(decode(self._window))

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        held = len(self._window) - self._num_read
        if text.endswith(_REPLACEMENT) and held < _MAX_HELD_TOKENS:
            return ""
        return self._advance(text)

    def flush(self) -> str:
        if self._num_read == len(self._window):
            return ""
        return self._advance(self._decode(self._window))

    def _advance(self, text: str) -> str:
        new = text[self._read_chars :]
        del self._window[: self._num_read]
        self._num_read = len(self._window)
        self._read_chars = len(self._decode(self._window))
        return new


class StopStrings:
    """Finds the first stop string in a stream of text, and never lets any part of one out before it is ruled out.

    Runs the Knuth-Morris-Pratt automaton of every stop string over each character, so the answer does not depend on how
    the text was cut. The match that ends first wins; of those that end together, the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops)
        self._stops = sorted(stops, key=len, reverse=True)
        self._failures = [_failure_table(stop) for stop in self._stops]
        # For each stop string, the length of its longest prefix that the text so far ends with.
        self._matched = [0] * len(self._stops)
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """(text that is safe to send, the stop string that was found). After a match nothing more may be fed."""
        for index, char in enumerate(text):
            if (stop := self._step(char)) is not None:
                whole = self._held + text[: index + 1]
                self._held = ""
                return whole[: -len(stop)], stop
        whole = self._held + text
        num_safe = len(whole) - max(self._matched, default=0)
        self._held = whole[num_safe:]
        return whole[:num_safe], None

    def flush(self) -> str:
        """The text held back, where the stream ends without a match."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held

    def _step(self, char: str) -> str | None:
        """Advances every automaton; the stop string that is complete, if any."""
        for index, stop in enumerate(self._stops):
            matched = self._matched[index]
            while matched and stop[matched] != char:
                matched = self._failures[index][matched - 1]
            if stop[matched] == char:
                matched += 1
            if matched == len(stop):
                return stop
            self._matched[index] = matched
        return None


def _failure_table(pattern: str) -> list[int]:
    """For each i the length of the longest proper prefix of pattern[: i + 1] that is also its suffix."""
    table = [0] * len(pattern)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[index] != pattern[length]:
            length = table[length - 1]
        if pattern[index] == pattern[length]:
            length += 1
        table[index] = length
    return table
