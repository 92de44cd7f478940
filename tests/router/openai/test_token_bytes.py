from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

from router.openai.token_bytes import TokenBytes
from tests.router.conftest import BOS


@pytest.mark.parametrize("text", ["hello world", " naïve café", "日本語 🙂", "\n\t\x00"])
def test_the_bytes_of_byte_level_tokens_add_up_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    token_bytes = TokenBytes(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert b"".join(map(token_bytes, ids)) == text.encode()


def test_half_a_character_shows_as_such(tokenizer: Tokenizer) -> None:
    token_bytes = TokenBytes(tokenizer)
    first, *_ = tokenizer.encode("🚀", add_special_tokens=False).ids
    assert token_bytes(first) == b"\xf0\x9f"
    assert token_bytes.text(first) == "\N{REPLACEMENT CHARACTER}"


def test_special_tokens_are_their_own_text(tokenizer: Tokenizer) -> None:
    token_bytes = TokenBytes(tokenizer)
    assert token_bytes.text(BOS) == "<s>"
    assert token_bytes.is_special(BOS)
    assert not token_bytes.is_special(50)


def test_ids_beyond_the_vocabulary_have_no_text(tokenizer: Tokenizer) -> None:
    assert TokenBytes(tokenizer)(10**6) == b""


def test_sentencepiece_tokens_keep_their_spaces_and_bytes() -> None:
    tokenizer = Tokenizer(models.BPE({"▁the": 0, "<0xF0>": 1, "▁": 2}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    token_bytes = TokenBytes(tokenizer)
    assert [token_bytes(token_id) for token_id in (0, 1, 2)] == [b" the", b"\xf0", b" "]


def test_metaspace_is_a_space() -> None:
    tokenizer = Tokenizer(models.Unigram([("▁the", 0.0), ("<unk>", 0.0)], 1, False))
    tokenizer.decoder = decoders.Metaspace()
    assert TokenBytes(tokenizer)(0) == b" the"


def test_other_tokenizers_decode_for_themselves() -> None:
    tokenizer = Tokenizer(models.WordPiece({"the": 0, "##re": 1}, unk_token="the"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([AddedToken("[CLS]", special=True)])
    token_bytes = TokenBytes(tokenizer)
    assert token_bytes(0) == b"the"
    assert token_bytes.text(2) == "[CLS]"
