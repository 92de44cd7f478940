"""Synthetic requests: lengths, what they share, and how conversations go on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from bench.load import workloads
from bench.load.requests import LoadRequest, Turn
from bench.load.targets import ServedModel
from bench.load.workloads import Lengths, Vocabulary

VOCABULARY = Vocabulary(100, 300)


def ids(request: LoadRequest) -> Sequence[Any]:
    assert isinstance(request.prompt, list)
    return request.prompt


def test_lengths_are_a_number_or_a_range() -> None:
    assert Lengths.parse("7") == Lengths(7, 7)
    assert Lengths.parse("2:9") == Lengths(2, 9)
    assert [str(Lengths.parse(text)) for text in ("7", "2:9")] == ["7", "2:9"]


@pytest.mark.parametrize("text", ["", "0", "-1", "9:2", "2:", "a", "1:2:3"])
def test_other_lengths_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        Lengths.parse(text)


def test_a_vocabulary_leaves_special_tokens_out() -> None:
    assert Vocabulary.of_size(1000) == Vocabulary(100, 1000)
    assert Vocabulary.of_size(50) == Vocabulary(25, 50)
    assert Vocabulary.of_model(ServedModel("m", vocab_size=200)) == Vocabulary(100, 200)
    assert Vocabulary.of_model(ServedModel("m", vocab_size=200), 400) == Vocabulary(100, 400)
    assert Vocabulary.of_model(ServedModel("m")).high == 1000


def test_random_requests_keep_to_their_lengths_and_vocabulary_and_follow_from_the_seed() -> None:
    arguments = (VOCABULARY, Lengths(3, 9), Lengths(2, 4), 200)
    requests = list(workloads.random_requests(*arguments, seed=1))
    assert {len(ids(request)) for request in requests} == set(range(3, 10))
    assert {request.max_tokens for request in requests} == {2, 3, 4}
    assert {token_id for request in requests for token_id in ids(request)} == set(range(100, 300))
    assert requests == list(workloads.random_requests(*arguments, seed=1))
    assert requests != list(workloads.random_requests(*arguments, seed=2))


def test_groups_share_their_prefix_and_nothing_else() -> None:
    requests = list(
        workloads.shared_prefix_requests(
            VOCABULARY, Lengths(16, 16), Lengths(1, 1), 50, 0, num_groups=3, prefix_tokens=32
        )
    )
    assert len({tuple(ids(request)[:32]) for request in requests}) == 3
    assert len({tuple(ids(request)[32:]) for request in requests}) == 50
    assert {len(ids(request)) for request in requests} == {48}


def test_a_turn_has_everything_before_it_as_its_prompt() -> None:
    (first,) = workloads.multi_turn_requests(VOCABULARY, Lengths(4, 4), Lengths(2, 2), 1, 0, num_turns=3, think_s=0.5)
    assert [turn.think_s for turn in first.follow_ups] == [0.5, 0.5]
    second = first.next_turn(text="", token_ids=[7, 8])
    assert second.prompt == [*ids(first), 7, 8, *first.follow_ups[0].prompt]
    third = second.next_turn(text="", token_ids=[9])
    assert third.prompt == [*ids(second), 9, *first.follow_ups[1].prompt]
    assert third.follow_ups == ()


def test_a_text_goes_on_as_a_text() -> None:
    request = LoadRequest("a", 1, follow_ups=(Turn("c", 2),))
    assert request.next_turn(text="b", token_ids=[]).prompt == "abc"


def test_chats_share_what_token_ids_share_and_go_on_with_messages() -> None:
    plain = list(
        workloads.shared_prefix_requests(VOCABULARY, Lengths(4, 4), Lengths(1, 1), 8, 0, num_groups=1, prefix_tokens=6)
    )
    contents = [request.prompt[0]["content"].split() for request in workloads.as_chats(plain)]  # type: ignore[index]
    assert {len(words) for words in contents} == {10}
    assert len({tuple(words[:6]) for words in contents}) == 1
    assert len({tuple(words) for words in contents}) == 8

    (chat,) = workloads.as_chats([LoadRequest([1], 1, follow_ups=(Turn([2], 1),))])
    question = chat.prompt[0]
    assert chat.next_turn(text="yes", token_ids=[]).prompt == [
        question,
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": chat.follow_ups[0].prompt},
    ]
