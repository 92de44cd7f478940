from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

from baton.internal.v1 import worker_pb2
from baton.requests import Delivered, FinishReason, SamplingParams
from baton.v1 import inference_pb2
from router.emission import Emission
from tests.router.conftest import EOS


def emission(tokenizer: Tokenizer, *, stops: Sequence[str] = (), n: int = 1, min_tokens: int = 0) -> Emission:
    return Emission(SamplingParams(max_tokens=100, n=n, min_tokens=min_tokens), stops, tokenizer.decode, ())


def token(
    token_id: int, position: int, *, choice: int = 0, finish: FinishReason = FinishReason.NONE
) -> worker_pb2.TokenOut:
    return worker_pb2.TokenOut(
        choice=choice,
        position=position,
        token_id=token_id,
        finish_reason=inference_pb2.FinishReason.ValueType(int(finish)),
    )


def tokens_for(tokenizer: Tokenizer, text: str) -> list[worker_pb2.TokenOut]:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return [token(token_id, position) for position, token_id in enumerate(ids)]


def test_a_step_s_tokens_make_one_delta_for_each_choice(tokenizer: Tokenizer) -> None:
    out = emission(tokenizer, n=2)
    deltas = out.take([token(50, 0, choice=1), token(51, 0), token(52, 1)])
    assert [(delta.index, list(delta.token_ids)) for delta in deltas] == [(1, [50]), (0, [51, 52])]
    assert deltas[1].text == tokenizer.decode([51, 52])


def test_eos_is_reported_and_is_no_part_of_the_text(tokenizer: Tokenizer) -> None:
    out = emission(tokenizer)
    delta = out.take([*tokens_for(tokenizer, "hi"), token(EOS, 2, finish=FinishReason.STOP)])[0]
    assert delta.text == "hi"
    assert delta.token_ids[-1] == EOS
    assert delta.finish_reason == inference_pb2.FINISH_REASON_STOP
    assert delta.stop_token_id == EOS
    assert out.finished


def test_a_stop_token_that_is_no_special_token_has_no_text_either(tokenizer: Tokenizer) -> None:
    out = emission(tokenizer)
    tokens = tokens_for(tokenizer, "hi!")
    tokens[-1].finish_reason = inference_pb2.FINISH_REASON_STOP
    assert out.take(tokens)[0].text == "hi"


def test_the_last_token_by_length_keeps_its_text(tokenizer: Tokenizer) -> None:
    out = emission(tokenizer, stops=["lo there"])
    tokens = tokens_for(tokenizer, "hello")
    tokens[-1].finish_reason = inference_pb2.FINISH_REASON_LENGTH
    delta = out.take(tokens)[0]
    assert delta.text == "hello"
    assert delta.finish_reason == inference_pb2.FINISH_REASON_LENGTH
    assert delta.WhichOneof("matched_stop") is None


def test_a_stop_string_ends_the_choice_and_what_follows_is_dropped(tokenizer: Tokenizer) -> None:
    out = emission(tokenizer, stops=["lo wo"])
    texts = [delta.text for entry in tokens_for(tokenizer, "hello world") for delta in out.take([entry])]
    assert "".join(texts) == "hel"
    assert out.finished
    assert out.choices[0].ended_by_string
    assert out.take([token(60, 99)]) == []


def test_a_stop_string_in_the_token_that_ends_by_length_wins(tokenizer: Tokenizer) -> None:
    out = emission(tokenizer, stops=["o"])
    tokens = tokens_for(tokenizer, "hello")
    tokens[-1].finish_reason = inference_pb2.FINISH_REASON_LENGTH
    delta = out.take(tokens)[0]
    assert (delta.text, delta.stop_text, delta.finish_reason) == ("hell", "o", inference_pb2.FINISH_REASON_STOP)


def test_stop_strings_do_not_count_before_min_tokens(tokenizer: Tokenizer) -> None:
    tokens = tokens_for(tokenizer, "abcabc")
    out = emission(tokenizer, stops=["b"], min_tokens=4)
    assert "".join(delta.text for entry in tokens for delta in out.take([entry])) == "abca"


def test_token_ids_are_sent_while_their_text_is_held_back(tokenizer: Tokenizer) -> None:
    out = emission(tokenizer, stops=["abz"])
    first, second = tokens_for(tokenizer, "ab")
    assert [(delta.text, len(delta.token_ids)) for delta in out.take([first]) + out.take([second])] == [
        ("", 1),
        ("", 1),
    ]


def test_delivered_is_what_was_taken(tokenizer: Tokenizer) -> None:
    out = emission(tokenizer, n=2)
    out.take([token(50, 0), token(51, 0, choice=1, finish=FinishReason.LENGTH)])
    assert out.delivered() == (Delivered((50,), False), Delivered((51,), True))
    assert not out.finished
    assert out.num_tokens == 2


def test_logprobs_travel_with_their_tokens(tokenizer: Tokenizer) -> None:
    out = emission(tokenizer)
    entry = token(50, 0)
    entry.logprobs.sampled.logprob = -0.25
    assert [position.sampled.logprob for position in out.take([entry])[0].logprobs] == [-0.25]
