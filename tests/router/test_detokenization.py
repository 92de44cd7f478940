from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from router.detokenization import ByteDetokenizer, Detokenizer, StopStrings, WindowDetokenizer
from tests.router.conftest import BOS, EOS


def pieces_of(decode: object, token_ids: Sequence[int], context: Sequence[int] = ()) -> list[str]:
    return pieces_by(WindowDetokenizer(decode, context), token_ids)  # type: ignore[arg-type]


def pieces_by(detokenizer: Detokenizer, token_ids: Iterable[int]) -> list[str]:
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


class TestWindowDetokenizer:
    @given(
        st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=40), st.data()
    )
    def test_any_split_of_a_text_into_tokens_gives_the_text(
        self, tokenizer: Tokenizer, text: str, data: st.DataObject
    ) -> None:
        """Cuts the text's bytes anywhere, so that characters are spread over tokens."""
        encoded = text.encode()
        cuts = sorted(data.draw(st.sets(st.integers(0, len(encoded)))) | {0, len(encoded)})
        token_ids = []
        for start, end in itertools.pairwise(cuts):
            part = encoded[start:end]
            try:
                token_ids += tokenizer.encode(part.decode(), add_special_tokens=False).ids
            except UnicodeDecodeError:
                token_ids += [byte_token(tokenizer, byte) for byte in part]
        assert "".join(pieces_of(tokenizer.decode, token_ids)) == text

    def test_a_character_comes_out_whole_with_its_last_byte(self, tokenizer: Tokenizer) -> None:
        token_ids = [byte_token(tokenizer, byte) for byte in "🙂!".encode()]
        assert pieces_of(tokenizer.decode, token_ids) == ["", "", "", "🙂", "!", ""]

    def test_an_incomplete_end_comes_out_as_a_replacement_character(self, tokenizer: Tokenizer) -> None:
        token_ids = [byte_token(tokenizer, byte) for byte in b"a\xf0\x9f"]
        assert pieces_of(tokenizer.decode, token_ids) == ["a", "", "", "\ufffd"]

    def test_special_tokens_have_no_text(self, tokenizer: Tokenizer) -> None:
        token_ids = [BOS, byte_token(tokenizer, ord("a")), EOS, byte_token(tokenizer, ord("b"))]
        assert "".join(pieces_of(tokenizer.decode, token_ids)) == "ab"

    def test_endless_garbage_is_not_held_forever(self, tokenizer: Tokenizer) -> None:
        pieces = pieces_of(tokenizer.decode, [byte_token(tokenizer, 0xFF)] * 200)
        assert sum(map(bool, pieces)) >= 3
        assert "".join(pieces) == "\ufffd" * 200

    def test_the_first_token_keeps_its_leading_space_after_a_prompt(self) -> None:
        """Metaspace decoders strip the space at the very start of a text only."""
        tokenizer = Tokenizer(models.WordLevel({"▁hello": 0, "▁world": 1}, unk_token="▁hello"))
        tokenizer.decoder = decoders.Metaspace()
        assert pieces_of(tokenizer.decode, [1], context=[0]) == [" world", ""]
        assert pieces_of(tokenizer.decode, [1]) == ["world", ""]


class TestByteDetokenizer:
    PIECES: ClassVar[dict[int, bytes]] = {byte: bytes([byte]) for byte in range(256)} | {
        256: "é🙂".encode(),
        257: b" \xf0\x9f",
        258: b"",
    }

    @pytest.mark.parametrize(
        ("token_ids", "pieces"),
        [
            (b"\x99\x82!", ["", "🙂", "!", ""]),
            (b"a\xf0", ["a", "", "\ufffd"]),
            (b"\x99", ["", ""]),
            (b"", [""]),
        ],
    )
    def test_what_the_context_began_comes_out_if_it_is_completed(self, token_ids: bytes, pieces: list[str]) -> None:
        assert pieces_by(ByteDetokenizer(self.PIECES, list(b"so \xf0\x9f")), token_ids) == pieces

    @given(st.lists(st.sampled_from([*range(0x60, 0x64), *range(0xC0, 0x100), *range(0x80, 0xA0), 256, 257, 258, 259])))
    def test_the_pieces_add_up_to_the_text_of_the_whole(self, token_ids: list[int]) -> None:
        whole = b"".join(self.PIECES.get(token_id, b"") for token_id in token_ids)
        assert "".join(pieces_by(ByteDetokenizer(self.PIECES), token_ids)) == whole.decode("utf-8", "replace")

    def test_a_character_comes_out_whole_with_its_last_byte(self) -> None:
        assert pieces_by(ByteDetokenizer(self.PIECES), "🙂!".encode()) == ["", "", "", "🙂", "!", ""]

    def test_an_incomplete_end_comes_out_as_a_replacement_character(self) -> None:
        assert pieces_by(ByteDetokenizer(self.PIECES), b"a\xf0\x9f") == ["a", "", "", "\ufffd"]

    def test_a_character_that_the_prompt_begins_is_ended(self) -> None:
        first, *rest = "🙂!".encode()
        assert pieces_by(ByteDetokenizer(self.PIECES, [ord("a"), first]), rest) == ["", "", "🙂", "!", ""]


def byte_token(tokenizer: Tokenizer, byte: int) -> int:
    """The token of a single byte, in GPT-2's printable spelling of bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in printable]
    char = chr(byte) if byte in printable else chr(256 + others.index(byte))
    token_id = tokenizer.token_to_id(char)
    assert token_id is not None
    return int(token_id)


def run_stops(stops: Sequence[str], pieces: Sequence[str]) -> tuple[list[str], str | None]:
    matcher = StopStrings(stops)
    sent = []
    for piece in pieces:
        safe, stop = matcher.feed(piece)
        sent.append(safe)
        if stop is not None:
            return sent, stop
    return [*sent, matcher.flush()], None


_letters = st.text(alphabet="ab", max_size=30)
_stops = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=3)


def first_match(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """By brute force: (text before the match that ends first, the longest of those that end there)."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


class TestStopStrings:
    @given(_letters, _stops, st.data())
    def test_the_answer_does_not_depend_on_how_the_text_is_cut(
        self, text: str, stops: list[str], data: st.DataObject
    ) -> None:
        cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))) | {0, len(text)})
        sent, stop = run_stops(stops, [text[start:end] for start, end in itertools.pairwise(cuts)])
        assert ("".join(sent), stop) == first_match(text, stops)

    @given(_letters, _stops)
    def test_nothing_that_may_begin_a_stop_string_is_ever_sent(self, text: str, stops: list[str]) -> None:
        matcher = StopStrings(stops)
        seen = sent = ""
        for char in text:
            safe, stop = matcher.feed(char)
            seen, sent = seen + char, sent + safe
            if stop is not None:
                break
            longest = max(
                (size for string in stops for size in range(len(string)) if seen.endswith(string[:size])), default=0
            )
            assert len(seen) - len(sent) == longest

    def test_a_match_across_pieces(self) -> None:
        assert run_stops(["</tool>"], ["a <", "/to", "ol> b"]) == (["a ", "", ""], "</tool>")

    def test_a_partial_match_is_sent_at_the_end(self) -> None:
        assert run_stops(["stop"], ["a", " sto"]) == (["a", " ", "sto"], None)

    @pytest.mark.parametrize(
        ("stops", "text", "expected"),
        [
            (["bcd", "bc"], "abcd", ("a", "bc")),
            (["c", "abc"], "xabc", ("x", "abc")),
            (["aab"], "aaab", ("a", "aab")),
        ],
    )
    def test_the_match_that_ends_first_wins_and_then_the_longest(
        self, stops: list[str], text: str, expected: tuple[str, str]
    ) -> None:
        sent, stop = run_stops(stops, [text])
        assert ("".join(sent), stop) == expected
