from __future__ import annotations

import dataclasses
import pathlib
import random
from collections.abc import Callable, Iterator

import pytest
from tokenizers import Tokenizer as FastTokenizer

from router.model_card import ModelCard, read_model_card
from router.tokenization import Tokenizer
from tests.router.conftest import BOS, make_tokenizer

MakeTokenizer = Callable[..., Tokenizer]


@pytest.fixture
def make(checkpoint: pathlib.Path) -> Iterator[MakeTokenizer]:
    made: list[Tokenizer] = []

    def start(folder: pathlib.Path = checkpoint, **changes: object) -> Tokenizer:
        card: ModelCard = dataclasses.replace(read_model_card(str(checkpoint), "m"), **changes)  # type: ignore[arg-type]
        made.append(Tokenizer(str(folder), card))
        return made[-1]

    yield start
    for tokenizer in made:
        tokenizer.close()


async def test_bos_is_there_once_and_text_comes_back(make: MakeTokenizer, tokenizer: FastTokenizer) -> None:
    ours = make()
    token_ids = await ours.encode("hello world")
    assert token_ids == tokenizer.encode("hello world").ids
    assert token_ids.count(BOS) == 1
    assert ours.decode(token_ids) == "hello world"
    assert ours.decode(token_ids, skip_special_tokens=False) == "<s>hello world"


@pytest.mark.parametrize("text", ["", " ", "hello  world", "é😀\n\tx", "<s>hello</s>", "word " * 5000])
@pytest.mark.parametrize("add_special_tokens", [True, False])
async def test_token_ids_are_the_library_s(
    make: MakeTokenizer, tokenizer: FastTokenizer, text: str, add_special_tokens: bool
) -> None:
    """Which encodes a single text by another way than ours."""
    expected = tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
    if expected[:2] == [BOS, BOS]:
        expected = expected[1:]
    assert await make().encode(text, add_special_tokens=add_special_tokens) == expected


def test_text_is_the_library_s(make: MakeTokenizer, tmp_path: pathlib.Path) -> None:
    """Whose decoder is asked only where a vocabulary is not byte-level."""
    library = make_tokenizer()
    # In the second, each character stands for a byte; in the third one does not.
    library.add_tokens(["<call>", "\u00e9\u0120", "\u65e5\u00e9"])
    library.add_special_tokens(["<\u65e5>"])
    library.save(str(tmp_path / "tokenizer.json"))
    ours, draw = make(tmp_path), random.Random(0)
    for _ in range(300):
        # Beyond the end there are ids that models with padded tables have.
        token_ids = draw.choices(range(library.get_vocab_size() + 4), k=draw.randint(0, 6))
        for skips in (True, False):
            text = ours.decode(token_ids, skip_special_tokens=skips)
            assert text == library.decode(token_ids, skip_special_tokens=skips), token_ids


async def test_bos_that_is_in_the_text_already_is_not_doubled(make: MakeTokenizer) -> None:
    ours = make()
    assert await ours.encode("<s>hello") == await ours.encode("hello")


async def test_bos_is_added_where_only_the_config_asks_for_it(make: MakeTokenizer, tmp_path: pathlib.Path) -> None:
    bare = make_tokenizer()
    without = await make().encode("hello", add_special_tokens=False)
    bare.post_processor = None
    bare.save(str(tmp_path / "tokenizer.json"))
    assert await make(tmp_path, adds_bos=True).encode("hello") == [BOS, *without]
    assert await make(tmp_path, adds_bos=None).encode("hello") == without


async def test_no_special_tokens_if_not_asked_for(make: MakeTokenizer) -> None:
    assert BOS not in await make().encode("hello", add_special_tokens=False)


async def test_a_tokenizer_s_own_truncation_is_turned_off(make: MakeTokenizer, tmp_path: pathlib.Path) -> None:
    short = make_tokenizer()
    short.enable_truncation(4)
    short.save(str(tmp_path / "tokenizer.json"))
    assert len(await make(tmp_path).encode("0123456789")) > 4


def test_a_missing_tokenizer_is_named_with_a_remedy(make: MakeTokenizer, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"has no tokenizer\.json; save the checkpoint's fast tokenizer"):
        make(tmp_path)


def test_a_broken_tokenizer_is_named(make: MakeTokenizer, tmp_path: pathlib.Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        make(tmp_path)
