"""Splits what a model thinks from what it answers: `<think>...</think>`, with the first tag in the prompt or not.

Models that write harmony are no matter of this file: their tool parser gives the reasoning too.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Literal

from router.openai.format_name import resolve_format_name
from router.openai.tools.base import ParsedDelta, ToolParser

_BEGIN = "<think>"
END_OF_REASONING = "</think>"

Thinking = Literal["none", "open", "optional"]
# name -> whether the model thinks even where neither the prompt nor its own text opens with the tag.
REASONING_FORMATS = {"deepseek_r1": True, "qwen3": False}
_ALIASES = {"deepseek-r1": "deepseek_r1", "qwen3-thinking": "qwen3", "think": "qwen3"}


def detect_reasoning(chat_template: str, vocab: Container[str]) -> str | None:
    """The reasoning format of a checkpoint, or None.

    Args:
        chat_template: its text.
        vocab: tokens that the tokenizer has, at least the added ones.
    """
    if "<|channel|>" in chat_template:
        return None
    # Models whose template leaves the reasoning alone still have tokens for its tags.
    if END_OF_REASONING not in chat_template and not (_BEGIN in vocab and END_OF_REASONING in vocab):
        return None
    # R1 and what was distilled from it always think; later DeepSeek models have a switch for it.
    is_deepseek = "<｜Assistant｜>" in chat_template
    return "deepseek_r1" if is_deepseek and "thinking" not in chat_template else "qwen3"


def resolve_reasoning(configured: str, chat_template: str | None, vocab: Container[str]) -> str | None:
    """The reasoning format that is served; None where nothing is split.

    Args:
        configured: a name, "auto" (guess) or "none".

    Raises:
        ValueError: no format has that name.
    """
    return resolve_format_name(
        "router.reasoning_format",
        configured,
        chat_template,
        vocab,
        formats=REASONING_FORMATS,
        aliases=_ALIASES,
        detect=detect_reasoning,
    )


def thinking_at(name: str | None, prompt: str) -> Thinking:
    """What a model with this reasoning format writes after the prompt.

    "open": reasoning up to `</think>`; "optional": perhaps reasoning, beginning with `<think>`; "none": an answer.
    """
    if name is None:
        return "none"
    if prompt.rstrip().endswith(_BEGIN):
        return "open"
    if prompt.rstrip().endswith(END_OF_REASONING):
        return "none"
    return "open" if REASONING_FORMATS[name] else "optional"


class ReasoningParser:
    """Gives reasoning and content; the content goes through a tool parser where there is one.

    As with tool parsers the deltas add up to the same however the text is cut. White space around the tags is left
    out. Belongs to one choice.

    Args:
        thinking: see `thinking_at`.
        tools: reads what follows the reasoning.
    """

    def __init__(self, thinking: Thinking, tools: ToolParser | None = None) -> None:
        self._tools = tools
        self._held = ""
        self._state: Literal["before", "thinking", "after", "answer"] = (
            "thinking" if thinking == "open" else "before" if thinking == "optional" else "answer"
        )
        # Of an opening tag that may still come, and of reasoning that was said.
        self._may_open = thinking != "none"
        self._said = False

    def feed(self, text: str) -> ParsedDelta:
        """Takes the next piece of the text."""
        if self._state == "answer":
            return self._answer(text)
        self._held += text
        return self._advance(ended=False)

    def finish(self) -> ParsedDelta:
        """What was held back, where the text ends here."""
        last = self._advance(ended=True) if self._state != "answer" else ParsedDelta()
        if self._tools is None:
            return last
        rest = self._tools.finish()
        return ParsedDelta(
            last.content + rest.content, last.reasoning + rest.reasoning, last.tool_calls + rest.tool_calls
        )

    def _advance(self, *, ended: bool) -> ParsedDelta:
        reasoning = ""
        if self._may_open and not self._open(ended):
            return ParsedDelta()
        if self._state == "thinking":
            reasoning = self._think(ended)
        if self._state == "after" and (text := self._held.lstrip()):
            self._held, self._state = text, "answer"
        if self._state != "answer":
            return ParsedDelta(reasoning=reasoning)
        text, self._held = self._held, ""
        answer = self._answer(text)
        return ParsedDelta(answer.content, reasoning + answer.reasoning, answer.tool_calls)

    def _open(self, ended: bool) -> bool:
        """Whether it is settled if the text begins with the opening tag; takes the tag away."""
        text = self._held.lstrip()
        if not ended and len(text) < len(_BEGIN) and _BEGIN.startswith(text):
            return False
        self._may_open = False
        if text.startswith(_BEGIN):
            self._held, self._state = text[len(_BEGIN) :], "thinking"
        elif self._state == "before":
            self._state = "answer"
        return True

    def _think(self, ended: bool) -> str:
        """Takes as much reasoning as is certain."""
        text = self._held if self._said else self._held.lstrip()
        before, tag, after = text.partition(END_OF_REASONING)
        if tag:
            self._held, self._state = after, "after"
            return before.rstrip()
        num_held = 0 if ended else _tag_begun(text)
        certain = text[: len(text) - num_held].rstrip()
        self._held = text[len(certain) :] if not ended else ""
        self._said = self._said or bool(certain)
        return certain

    def _answer(self, text: str) -> ParsedDelta:
        if self._tools is None or not text:
            return ParsedDelta(text)
        return self._tools.feed(text)


def _tag_begun(text: str) -> int:
    """How many characters at the end of the text may be the beginning of the end tag."""
    return next(
        (n for n in range(min(len(text), len(END_OF_REASONING) - 1), 0, -1) if END_OF_REASONING.startswith(text[-n:])),
        0,
    )
