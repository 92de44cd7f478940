from __future__ import annotations

from tokenizers import Tokenizer

from router.openai.logprobs import CompletionLogprobs, TokenNames, chat_logprobs, prompt_logprobs
from router.openai.token_bytes import TokenBytes
from tests.router.conftest import BOS
from tests.router.openai.fake_pipeline import position


def names(tokenizer: Tokenizer, *, as_ids: bool = False) -> TokenNames:
    return TokenNames(TokenBytes(tokenizer), as_ids=as_ids)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def offsets(tokenizer: Tokenizer, ids: list[int], *, skips_special: bool = True, text: str | None = None) -> list[int]:
    logprobs = CompletionLogprobs(names(tokenizer), num_top=0, skips_special=skips_special, text=text)
    return logprobs.take(ids, [None] * len(ids))["text_offset"]


def test_offsets_count_characters_of_the_text(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, "hello café 🙂!")
    token_bytes = TokenBytes(tokenizer)
    found = offsets(tokenizer, ids)
    assert found[0] == 0
    assert found[-1] == len("hello café 🙂")
    for index, offset in enumerate(found):
        before = b"".join(map(token_bytes, ids[:index])).decode(errors="ignore")
        assert offset == len(before)


def test_special_tokens_take_room_only_where_they_are_shown(tokenizer: Tokenizer) -> None:
    ids = [BOS, *ids_of(tokenizer, "a")]
    assert offsets(tokenizer, ids) == [0, 0]
    assert offsets(tokenizer, ids, skips_special=False) == [0, 3]


def test_a_first_space_that_the_text_lacks_takes_no_room(tokenizer: Tokenizer) -> None:
    ids = [*ids_of(tokenizer, " a"), *ids_of(tokenizer, "b")]
    assert offsets(tokenizer, ids, text=" ab")[-1] == 2
    assert offsets(tokenizer, ids, text="ab")[-1] == 1


def test_offsets_go_on_from_one_call_to_the_next(tokenizer: Tokenizer) -> None:
    (token_id,) = ids_of(tokenizer, "a")
    logprobs = CompletionLogprobs(names(tokenizer), num_top=0, skips_special=True)
    assert [logprobs.take([token_id], [None])["text_offset"] for _ in range(3)] == [[0], [1], [2]]


def test_the_sampled_token_is_among_the_likeliest(tokenizer: Tokenizer) -> None:
    a, b = ids_of(tokenizer, "a")[0], ids_of(tokenizer, "b")[0]
    logprobs = CompletionLogprobs(names(tokenizer), num_top=1, skips_special=True)
    taken = logprobs.take([a, b], [position(a, -2.0, {b: -0.5}), position(b, -0.5, {b: -0.5, a: -3.0})])
    assert taken["top_logprobs"] == [{"b": -0.5, "a": -2.0}, {"b": -0.5}]
    assert taken["token_logprobs"] == [-2.0, -0.5]


def test_of_tokens_that_read_alike_the_likelier_is_told(tokenizer: Tokenizer) -> None:
    first, second = ids_of(tokenizer, "🚀")[:2]
    logprobs = CompletionLogprobs(names(tokenizer), num_top=1, skips_special=True)
    taken = logprobs.take([second], [position(second, -2.0, {first: -0.5})])
    assert taken["top_logprobs"] == [{"\N{REPLACEMENT CHARACTER}": -0.5}]


def test_what_is_impossible_is_a_number_all_the_same(tokenizer: Tokenizer) -> None:
    (token_id,) = ids_of(tokenizer, "a")
    impossible = position(token_id, float("-inf"), {token_id: float("-inf")})
    (chat,) = chat_logprobs(names(tokenizer), [impossible])
    assert chat["logprob"] == chat["top_logprobs"][0]["logprob"] == -9999.0
    _, prompt = prompt_logprobs(names(tokenizer), [impossible], 1)
    assert prompt == {str(token_id): {"logprob": -9999.0, "rank": 1, "decoded_token": "a"}}


def test_tokens_can_be_named_by_their_ids(tokenizer: Tokenizer) -> None:
    logprobs = CompletionLogprobs(names(tokenizer, as_ids=True), num_top=1, skips_special=True)
    taken = logprobs.take([5], [position(5, -1.0, {6: -0.5})])
    assert taken["tokens"] == ["token_id:5"]
    assert taken["top_logprobs"] == [{"token_id:6": -0.5, "token_id:5": -1.0}]
