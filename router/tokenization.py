"""Text to token ids and back, by the checkpoint's own tokenizer.json and the `tokenizers` library.

Encoding any but a short text runs in a small pool of threads, by the one call of the library that lets go of the GIL
(that for a batch), so that a long prompt stops nobody's stream.
Decoding a few tokens is cheaper than a thread hop and runs where it is called; of byte-level vocabularies, which most
models have, it is done here, since the call into the library costs several times as much as joining a few bytes.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import ParamSpec, TypeVar

from tokenizers import Tokenizer as FastTokenizer

from router.detokenization import ByteDetokenizer, Detokenizer, WindowDetokenizer
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
        decoder = "" if self._tokenizer.decoder is None else self._tokenizer.decoder.__getstate__().decode()
        self._pieces = BytePieces(self._tokenizer) if json.loads(decoder or "{}").get("type") == "ByteLevel" else None
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

    def detokenizer(self, context: Sequence[int], *, skip_special_tokens: bool) -> Detokenizer:
        """Makes text of the tokens that come after these, one at a time."""
        if self._pieces is not None:
            return ByteDetokenizer(self._pieces.bytes_of(skip_special_tokens), context)
        return WindowDetokenizer(functools.partial(self.decode, skip_special_tokens=skip_special_tokens), context)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        if self._pieces is not None:
            pieces = self._pieces.bytes_of(skip_special_tokens)
            return b"".join([pieces.get(token_id, b"") for token_id in token_ids]).decode("utf-8", "replace")
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


class BytePieces:
    """The bytes of each token of a byte-level vocabulary, as the library's `ByteLevel` decoder has them."""

    def __init__(self, tokenizer: FastTokenizer) -> None:
        alphabet = byte_level_alphabet()
        self._all_bytes: dict[int, bytes] = {}
        for piece, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
            try:
                self._all_bytes[token_id] = b"".join([alphabet[char] for char in piece])
            except KeyError:
                # An added token with a character that stands for no byte: it is taken as it is.
                self._all_bytes[token_id] = piece.encode()
        self._text_bytes = self._all_bytes.copy()
        for token_id, token in tokenizer.get_added_tokens_decoder().items():
            if token.special:
                self._text_bytes[token_id] = b""

    def bytes_of(self, skip_special_tokens: bool) -> Mapping[int, bytes]:
        """By token id; of special tokens none, where they are skipped. Ids that are no token are missing."""
        return self._text_bytes if skip_special_tokens else self._all_bytes


def byte_level_alphabet() -> dict[str, bytes]:
    """The characters that byte-level BPE writes for bytes: those that print as themselves, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): bytes([byte]) for byte in printable}
    others = [byte for byte in range(256) if chr(byte) not in alphabet]
    return alphabet | {chr(0x100 + index): bytes([byte]) for index, byte in enumerate(others)}


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
