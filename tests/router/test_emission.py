from __future__ import annotations

import functools
from collections.abc import Sequence

from tokenizers import Tokenizer

from baton.internal.v1 import worker_pb2
from baton.requests import Delivered, FinishReason, Grammar, GrammarKind, SamplingParams
from baton.v1 import inference_pb2
from router.detokenization import WindowDetokenizer
from router.emission import Emission
from tests.router.conftest import EOS


def emission(tokenizer: Tokenizer, *, stops: Sequence[str] = (), n: int = 1, min_tokens: int = 0) -> Emission:
    return Emission(
        SamplingParams(max_tokens=100, n=n, min_tokens=min_tokens),
        stops,
        functools.partial(WindowDetokenizer, tokenizer.decode),
    )


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


def text_of(deltas: Sequence[inference_pb2.ChoiceDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def test_each_token_makes_a_delta_in_order(tokenizer: Tokenizer) -> None:
    out = emission(tokenizer, n=2)
    deltas = out.take([token(50, 0, choice=1), token(51, 0), token(52, 1)])
    assert [(delta.index, list(delta.token_ids)) for delta in deltas] == [(1, [50]), (0, [51]), (0, [52])]
    assert text_of(deltas[1:]) == tokenizer.decode([51, 52])


def test_eos_is_reported_and_is_no_part_of_the_text(tokenizer: Tokenizer) -> None:
    out = emission(tokenizer)
    deltas = out.take([*tokens_for(tokenizer, "hi"), token(EOS, 2, finish=FinishReason.STOP)])
    assert text_of(deltas) == "hi"
    delta = deltas[-1]
    assert (delta.text, list(delta.token_ids)) == ("", [EOS])
    assert delta.finish_reason == inference_pb2.FINISH_REASON_STOP
    assert delta.stop_token_id == EOS
    assert out.finished


def test_a_stop_token_that_is_no_special_token_has_no_text_either(tokenizer: Tokenizer) -> None:
    out = emission(tokenizer)
    tokens = tokens_for(tokenizer, "hi!")
    tokens[-1].finish_reason = inference_pb2.FINISH_REASON_STOP
    assert text_of(out.take(tokens)) == "hi"


def test_the_text_of_a_stop_token_is_sent_if_asked_for(tokenizer: Tokenizer) -> None:
    tokens = tokens_for(tokenizer, "hi!")
    tokens[-1].finish_reason = inference_pb2.FINISH_REASON_STOP
    sampling = SamplingParams(max_tokens=9, stop_token_ids=(tokens[-1].token_id,))
    out = Emission(sampling, (), functools.partial(WindowDetokenizer, tokenizer.decode), include_stop=True)
    deltas = out.take(tokens)
    assert text_of(deltas) == "hi!"
    assert deltas[-1].stop_token_id == tokens[-1].token_id


def test_the_text_of_a_stop_string_is_sent_if_asked_for(tokenizer: Tokenizer) -> None:
    out = Emission(
        SamplingParams(max_tokens=99),
        ["lo wo"],
        functools.partial(WindowDetokenizer, tokenizer.decode),
        include_stop=True,
    )
    deltas = out.take(tokens_for(tokenizer, "hello world"))
    assert text_of(deltas) == "hello wo"
    assert deltas[-1].stop_text == "lo wo"


def test_special_tokens_are_text_if_asked_for_but_not_the_eos_that_ends(tokenizer: Tokenizer) -> None:
    decode = functools.partial(tokenizer.decode, skip_special_tokens=False)
    out = Emission(
        SamplingParams(max_tokens=99, eos_token_ids=(EOS,)),
        (),
        functools.partial(WindowDetokenizer, decode),
        include_stop=True,
    )
    special = tokenizer.decode([EOS], skip_special_tokens=False)
    deltas = out.take([token(EOS, 0), *tokens_for(tokenizer, "hi"), token(EOS, 3, finish=FinishReason.STOP)])
    assert special
    assert text_of(deltas) == special + "hi"


def test_the_last_token_of_a_grammar_is_text_and_no_stop_token(tokenizer: Tokenizer) -> None:
    grammar = Grammar(GrammarKind.REGEX, ("hi!",))
    out = Emission(
        SamplingParams(max_tokens=9, eos_token_ids=(EOS,), grammar=grammar),
        (),
        functools.partial(WindowDetokenizer, tokenizer.decode),
    )
    tokens = tokens_for(tokenizer, "hi!")
    tokens[-1].finish_reason = inference_pb2.FINISH_REASON_STOP
    deltas = out.take(tokens)
    assert text_of(deltas) == "hi!"
    assert deltas[-1].finish_reason == inference_pb2.FINISH_REASON_STOP
    assert deltas[-1].WhichOneof("matched_stop") is None


def test_choices_of_which_nothing_is_wanted_end_by_length(tokenizer: Tokenizer) -> None:
    out = emission(tokenizer, n=2)
    deltas = out.end()
    assert [(d.index, list(d.token_ids), d.finish_reason) for d in deltas] == [
        (0, [], inference_pb2.FINISH_REASON_LENGTH),
        (1, [], inference_pb2.FINISH_REASON_LENGTH),
    ]
    assert out.finished
    assert out.num_tokens == 0


def test_the_last_token_by_length_keeps_its_text(tokenizer: Tokenizer) -> None:
    out = emission(tokenizer, stops=["lo there"])
    tokens = tokens_for(tokenizer, "hello")
    tokens[-1].finish_reason = inference_pb2.FINISH_REASON_LENGTH
    deltas = out.take(tokens)
    assert text_of(deltas) == "hello"
    delta = deltas[-1]
    assert delta.finish_reason == inference_pb2.FINISH_REASON_LENGTH
    assert delta.WhichOneof("matched_stop") is None


def test_a_stop_string_ends_the_choice_and_what_follows_is_dropped(tokenizer: Tokenizer) -> None:
    out = emission(tokenizer, stops=["lo wo"])
    texts = [delta.text for entry in tokens_for(tokenizer, "hello world") for delta in out.take([entry])]
    assert "".join(texts) == "hel"
    assert out.finished
    assert out.choices[0].ended_by_router
    assert out.take([token(60, 99)]) == []


def test_a_stop_string_in_the_token_that_ends_by_length_wins(tokenizer: Tokenizer) -> None:
    out = emission(tokenizer, stops=["o"])
    tokens = tokens_for(tokenizer, "hello")
    tokens[-1].finish_reason = inference_pb2.FINISH_REASON_LENGTH
    deltas = out.take(tokens)
    assert text_of(deltas) == "hell"
    assert (deltas[-1].stop_text, deltas[-1].finish_reason) == ("o", inference_pb2.FINISH_REASON_STOP)


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
