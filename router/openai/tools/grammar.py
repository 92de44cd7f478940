"""Grammars that make a model write calls in its format: llguidance's Lark dialect with `%json` for the arguments.

https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_ANY_TEXT = r"/(.|\n)*/"
_SPACE = r"/[ \n]*/"
# Within JSON: small models would go on with white space for ever.
_JSON_OPTIONS = {"x-guidance": {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,64}"}}
_CALL_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class GrammarBuilder:
    """Collects the rules of one grammar; its methods return what stands for a piece in a rule's body.

    Args:
        special_tokens: ids of the tokens that the tokenizer marks as special, by their text. Such a token is no text
            for a grammar, so it must be named by its id.
    """

    def __init__(self, special_tokens: Mapping[str, int]) -> None:
        self._special_tokens = special_tokens
        self._rules: list[str] = []

    def is_special(self, text: str) -> bool:
        """Whether the tokenizer has a special token of this text."""
        return text in self._special_tokens

    def literal(self, text: str) -> str:
        """Exactly this text, or the special token of this name."""
        if text in self._special_tokens:
            return f"<[{self._special_tokens[text]}]>"
        return json.dumps(text, ensure_ascii=False)

    def json(self, schema: Mapping[str, Any]) -> str:
        """A JSON value of this schema."""
        return self.rule(f"%json {json.dumps({**_JSON_OPTIONS, **schema}, ensure_ascii=False)}")

    def arguments(self, schema: Mapping[str, Any]) -> str:
        """The JSON object of a call's arguments, spaced as templates write it and models have learnt it."""
        return self.json({"type": "object", **schema, "x-guidance": _CALL_STYLE})

    def text_until(self, end: str, *, without: Sequence[str] = ()) -> str:
        """Any text that has none of the strings in it, and the first appearance of `end` after it."""
        text = _ANY_TEXT
        if without:
            strings = "|".join(re.escape(string).replace("/", r"\/") for string in without)
            text = self.rule(rf"{_ANY_TEXT} & ~/(.|\n)*({strings})(.|\n)*/", prefix="T")
        if self.is_special(end):
            return f"{text} {self.literal(end)}"
        return self.rule(text, options=f"[suffix={json.dumps(end, ensure_ascii=False)}]")

    def rule(self, body: str, *, options: str = "", prefix: str = "r") -> str:
        """A rule of its own, or a terminal (one regular expression) where the prefix is a capital."""
        name = f"{prefix}{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name

    def repeated(self, item: str, separator: str, *, parallel: bool) -> str:
        """One item, or more of them with the separator (a piece of a body, maybe empty) between."""
        return f"{item} ({separator} {item})*" if parallel else item

    def build(self, body: str, *, thinking: str) -> str:
        """The whole grammar.

        Args:
            thinking: "open" where the prompt ends within the model's reasoning, which comes to its end first;
                "optional" where the model may reason first; "none".
        """
        if thinking != "none":
            think = f"{self.text_until('</think>')} {_SPACE}"
            body = f"{think} ({body})" if thinking == "open" else f"({self.literal('<think>')} {think})? ({body})"
        return "\n".join([f"start: {body}", *self._rules])


def in_order(builder: GrammarBuilder, pieces: list[tuple[str, bool]], separator: str) -> str:
    """Rules for pieces that come in this order, separated, of which some may be left out.

    Args:
        pieces: body of each, and whether it must come.
    """
    nothing = '""'
    # From the last piece back: what may follow once something was written, and while nothing was.
    separated, first = nothing, nothing
    for body, required in reversed(pieces):
        with_this = f"{body} {separated}"
        after = f"{separator} {with_this}"
        separated, first = (
            builder.rule(after if required else f"{after} | {separated}"),
            builder.rule(with_this if required else f"{with_this} | {first}"),
        )
    return first
