"""Text to token ids and back, by the checkpoint's own tokenizer.json and the `tokenizers` library.

Encoding any but a short text runs in a small pool of threads, by the one call of the library that lets go of the GIL
(that for a batch), so that a long prompt stops nobody's stream.
Decoding a few tokens is cheaper than a thread hop and runs where it is called.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

from tokenizers import Tokenizer as FastTokenizer

from router.model_card import ModelCard

# Texts up to this long are encoded in less time than a thread hop takes.
_MAX_INLINE_CHARS = 512
# Single tokens whose text is kept: about a megabyte.
_MAX_REMEMBERED = 8192

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Tokenizer:
    """One model's tokenizer; close it to end its threads.

    Args:
        path: checkpoint folder; ValueError where it has no tokenizer.json.
        num_threads: texts that are encoded at a time.
    """

    def __init__(self, path: str, card: ModelCard, *, num_threads: int = 2) -> None:
        self._tokenizer = _load(pathlib.Path(path))
        self._bos_token_id = card.bos_token_id
        self._adds_bos = bool(card.adds_bos)
        self._decode_one = functools.lru_cache(_MAX_REMEMBERED)(lambda token_id, skip: self._decode([token_id], skip))
        self._pool = concurrent.futures.ThreadPoolExecutor(num_threads, thread_name_prefix="tokenizer")

    @property
    def fast(self) -> FastTokenizer:
        """The library's object, for what only it knows."""
        return self._tokenizer

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids; with special tokens, BOS stands there exactly once where the model wants one."""
        if len(text) <= _MAX_INLINE_CHARS:
            return self._encode(text, add_special_tokens)
        return await self.run(self._encode, text, add_special_tokens)

    async def run(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Runs other work that grows with the prompt in the same threads."""
        return await asyncio.wrap_future(self._pool.submit(function, *args, **kwargs))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids. That of a single token is remembered: detokenizing asks for one after every token."""
        if len(token_ids) == 1:
            return self._decode_one(token_ids[0], skip_special_tokens)
        return self._decode(token_ids, skip_special_tokens)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # `encode` would hold the GIL throughout.
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        bos = self._bos_token_id
        if not add_special_tokens or bos is None:
            return ids
        if ids[:2] == [bos, bos]:
            return ids[1:]
        if self._adds_bos and ids[:1] != [bos]:
            return [bos, *ids]
        return ids


def _load(folder: pathlib.Path) -> FastTokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no tokenizer.json; save the checkpoint's fast tokenizer there "
            "(transformers: AutoTokenizer.from_pretrained(...).save_pretrained(folder))"
        )
    try:
        tokenizer = FastTokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path} cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
