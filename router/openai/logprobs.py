"""Logprobs in the shapes of OpenAI's completions and chats, and vLLM's prompt logprobs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from baton.v1 import inference_pb2
from router.openai.token_bytes import TokenBytes

# JSON has no infinity; vLLM writes this.
_LEAST = -9999.0


class TokenNames:
    """What clients read for a token.

    Args:
        as_ids: write `token_id:N` for each, as `return_tokens_as_token_ids` asks.
    """

    def __init__(self, token_bytes: TokenBytes, *, as_ids: bool = False) -> None:
        self.token_bytes = token_bytes
        self._as_ids = as_ids

    def __call__(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self.token_bytes.text(token_id)


class CompletionLogprobs:
    """`logprobs` of one choice of a completion, over all its events.

    Args:
        num_top: likeliest tokens to name at each position.
        skips_special: special tokens take no room in the text.
        text: what the first tokens stand for, where it is known: decoders may have dropped a space before it.
    """

    def __init__(self, names: TokenNames, *, num_top: int, skips_special: bool, text: str | None = None) -> None:
        self._names = names
        self._num_top = num_top
        self._skips_special = skips_special
        self._text = text
        self._offset = 0

    def take(
        self, token_ids: Sequence[int], positions: Sequence[inference_pb2.PositionLogprobs | None]
    ) -> dict[str, list[Any]]:
        """The tokens that follow; a position without logprobs (the first of a prompt) gives null."""
        return {
            "tokens": [self._names(token_id) for token_id in token_ids],
            "token_logprobs": [None if each is None else _finite(each.sampled.logprob) for each in positions],
            "top_logprobs": [None if each is None else self._top(each) for each in positions],
            "text_offset": [self._next_offset(token_id) for token_id in token_ids],
        }

    def _top(self, position: inference_pb2.PositionLogprobs) -> dict[str, float]:
        """The most likely tokens and the sampled one. Of tokens that read alike the likelier is told."""
        top: dict[str, float] = {}
        for each in (*position.top[: self._num_top], position.sampled):
            name = self._names(each.token_id)
            top[name] = max(top.get(name, _LEAST), _finite(each.logprob))
        return top

    def _next_offset(self, token_id: int) -> int:
        offset = max(self._offset, 0)
        if self._skips_special and self._names.token_bytes.is_special(token_id):
            return offset
        token_bytes = self._names.token_bytes(token_id)
        if self._text is not None:
            self._offset -= token_bytes.startswith(b" ") and not self._text.startswith(" ")
            self._text = None
        self._offset += sum(byte & 0xC0 != 0x80 for byte in token_bytes)
        # A token that goes on with a character stands where that began.
        goes_on = bool(token_bytes) and token_bytes[0] & 0xC0 == 0x80
        return max(offset - goes_on, 0)


def chat_logprobs(names: TokenNames, positions: Iterable[inference_pb2.PositionLogprobs]) -> list[dict[str, Any]]:
    """`logprobs.content` of a chat's tokens."""
    return [
        {**_chat_token(names, each.sampled), "top_logprobs": [_chat_token(names, top) for top in each.top]}
        for each in positions
    ]


def prompt_logprobs(
    names: TokenNames, positions: Sequence[inference_pb2.PositionLogprobs], num_top: int
) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's `prompt_logprobs`: for each token of the prompt but the first, the likeliest there and its own, by id."""
    return [None, *(_by_id(names, position, num_top) for position in positions)]


def _by_id(names: TokenNames, position: inference_pb2.PositionLogprobs, num_top: int) -> dict[str, dict[str, Any]]:
    ranks = {each.token_id: rank for rank, each in enumerate(position.top, 1)}
    return {
        str(each.token_id): {
            "logprob": _finite(each.logprob),
            # Known only of the likeliest.
            "rank": ranks.get(each.token_id),
            "decoded_token": names.token_bytes.text(each.token_id),
        }
        for each in (position.sampled, *position.top[:num_top])
    }


def _chat_token(names: TokenNames, token: inference_pb2.TokenLogprob) -> dict[str, Any]:
    return {
        "token": names(token.token_id),
        "logprob": _finite(token.logprob),
        "bytes": list(names.token_bytes(token.token_id)),
    }


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
