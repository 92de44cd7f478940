"""Follows JSON text as it comes, character by character: where a value ends, and that it is JSON so far."""

from __future__ import annotations

import json
import re

# Deeper values are no JSON here: clients' own parsers give up not far beyond.
_MAX_DEPTH = 128
_MAX_SCALAR_CHARS = 400
_SPACE = " \t\n\r"
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
# Every beginning of a number.
_NUMBER_BEGUN = re.compile(r"-?(?:(?:0|[1-9][0-9]*)(?:\.(?:[0-9]+(?:[eE][+-]?[0-9]*)?)?|[eE][+-]?[0-9]*)?)?")
_WORDS = ("true", "false", "null")


class JsonScanner:
    """One JSON value, without white space before it.

    Takes one liberty: a bare control character in a string, which models do write, comes out escaped.

    Attributes:
        done: the value has ended.
        failed: what came cannot be JSON any more.
    """

    def __init__(self) -> None:
        self.done = False
        self.failed = False
        self._stack: list[str] = []
        # What may come: value, first (value or "]"), key, first_key (key or "}"), colon, more ("," or the end),
        # string, escape, hex (digits of \u), scalar.
        self._state = "value"
        self._in_key = False
        self._num_hex = 0
        self._scalar = ""

    def scan(self, text: str, start: int) -> tuple[str, int]:
        """Reads `text` from `start` on; (the JSON that was read, where reading stopped).

        It stops at the end of the text, after the value (`done`), or before the first character that is no JSON
        (`failed`).
        """
        pieces: list[str] = []
        position = start
        while position < len(text) and not self.done:
            if self._state == "string" and (plain := _PLAIN.match(text, position)):
                pieces.append(plain.group())
                position = plain.end()
                continue
            char = text[position]
            if self._state == "scalar" and not self._takes(char):
                # The character that ends a number or a word is read again as what follows it.
                if not self._end_scalar():
                    self.failed = True
                    break
                continue
            if not self._step(char):
                self.failed = True
                break
            pieces.append(json.dumps(char)[1:-1] if self._state == "string" and char < " " else char)
            position += 1
        return "".join(pieces), position

    def finish(self) -> bool:
        """Whether the value is whole, where the text ends here: only a bare number or word needs to be told."""
        if self._state == "scalar" and not self._stack and not self.failed:
            self._end_scalar()
        return self.done

    def _step(self, char: str) -> bool:
        """Takes one character; False where it cannot stand here."""
        state = self._state
        if state == "string":
            if char == '"':
                self._state = "colon" if self._in_key else "more"
                self._end_value()
            elif char == "\\":
                self._state = "escape"
            return True
        if state == "escape":
            if char == "u":
                self._state, self._num_hex = "hex", 0
                return True
            self._state = "string"
            return char in '"\\/bfnrt'
        if state == "hex":
            self._num_hex += 1
            if self._num_hex == 4:
                self._state = "string"
            return char in "0123456789abcdefABCDEF"
        if state == "scalar":
            self._scalar += char
            return True
        # Before the value there is no white space, and after it nothing is read.
        if char in _SPACE:
            return bool(self._stack)
        return self._structure(char)

    def _structure(self, char: str) -> bool:
        state = self._state
        if state in ("key", "first_key"):
            if char == '"':
                self._state, self._in_key = "string", True
                return True
            return state == "first_key" and char == "}" and self._close("{")
        if state == "colon":
            self._state = "value"
            return char == ":"
        if state == "more":
            if char == ",":
                self._state = "key" if self._stack[-1] == "{" else "value"
                return True
            return char in "}]" and self._close("{" if char == "}" else "[")
        if state == "first" and char == "]":
            return self._close("[")
        return self._begin_value(char)

    def _begin_value(self, char: str) -> bool:
        if char in "{[":
            if len(self._stack) == _MAX_DEPTH:
                return False
            self._stack.append(char)
            self._state = "first_key" if char == "{" else "first"
            return True
        if char == '"':
            self._state, self._in_key = "string", False
            return True
        self._scalar = ""
        if not self._takes(char):
            return False
        self._state, self._scalar = "scalar", char
        return True

    def _takes(self, char: str) -> bool:
        """Whether the number or word may go on with this character."""
        longer = self._scalar + char
        if len(longer) > _MAX_SCALAR_CHARS:
            return False
        return bool(_NUMBER_BEGUN.fullmatch(longer)) or any(word.startswith(longer) for word in _WORDS)

    def _end_scalar(self) -> bool:
        if len(self._scalar) == _MAX_SCALAR_CHARS:
            return False
        if self._scalar not in _WORDS and not _NUMBER.fullmatch(self._scalar):
            return False
        self._state = "more"
        self._end_value()
        return True

    def _close(self, opening: str) -> bool:
        if self._stack.pop() != opening:
            return False
        self._state = "more"
        self._end_value()
        return True

    def _end_value(self) -> None:
        if not self._stack:
            self.done = True
