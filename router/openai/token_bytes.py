"""What each token of the vocabulary stands for: its bytes, and its text where logprobs name it."""

from __future__ import annotations

import re

from tokenizers import Tokenizer as FastTokenizer

from router.tokenization import byte_level_alphabet

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_METASPACE = "\N{LOWER ONE EIGHTH BLOCK}"


class TokenBytes:
    """Reads the pieces of one tokenizer; what was read once is kept.

    Decoding a token alone would not do: decoders drop a first space, and half a character has no text.
    """

    def __init__(self, tokenizer: FastTokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._added = {token_id: token.content.encode() for token_id, token in added.items()}
        self._special = {token_id for token_id, token in added.items() if token.special}
        decoder = "" if tokenizer.decoder is None else tokenizer.decoder.__getstate__().decode()
        self._byte_level = byte_level_alphabet() if '"ByteLevel"' in decoder else None
        self._has_bytes = '"ByteFallback"' in decoder
        self._has_metaspace = '"Metaspace"' in decoder or _METASPACE in decoder
        self._known: dict[int, bytes] = {}

    def __call__(self, token_id: int) -> bytes:
        """The bytes of a token; none for an id that the tokenizer does not know, as models with padded tables have."""
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._read(token_id)
        return known

    def text(self, token_id: int) -> str:
        """The token as text; what is no whole character shows as U+FFFD."""
        return self(token_id).decode("utf-8", errors="replace")

    def is_special(self, token_id: int) -> bool:
        """Whether text leaves the token out, unless it is asked for."""
        return token_id in self._special

    def _read(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id]
        piece: str | None = self._tokenizer.id_to_token(token_id)
        if piece is None:
            return b""
        if self._byte_level is not None:
            alphabet = self._byte_level
            return b"".join(alphabet.get(char) or char.encode() for char in piece)
        if self._has_bytes and (byte := _BYTE.fullmatch(piece)):
            return bytes([int(byte.group(1), 16)])
        if self._has_metaspace:
            return piece.replace(_METASPACE, " ").encode()
        text: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text.encode()
