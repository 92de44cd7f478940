"""Streams as servers send them: whole and in pieces, with one token, several or none in an event."""

from __future__ import annotations

import json
from typing import Any

import pytest

from baton.errors import InternalError
from bench.load.outcome import Outcome
from bench.load.requests import LoadRequest
from bench.load.sse import EventReader

DONE = b"data: [DONE]\n\n"


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text(text: str, **fields: Any) -> bytes:
    return event(choices=[{"index": 0, "text": text, "finish_reason": None, **fields}])


def delta(finish_reason: str | None = None, **fields: Any) -> bytes:
    return event(choices=[{"index": 0, "delta": fields, "finish_reason": finish_reason}])


def usage(completion_tokens: int, **fields: Any) -> bytes:
    return event(choices=[], usage={"prompt_tokens": 3, "completion_tokens": completion_tokens, **fields})


def read(*chunks: bytes, keeps_answer: bool = False) -> Outcome:
    """Chunk number i comes at i seconds."""
    outcome = Outcome(LoadRequest([1, 2, 3], 4), 0.0)
    reader = EventReader(outcome, keeps_answer=keeps_answer)
    for at_s, chunk in enumerate(chunks):
        reader.feed(chunk, float(at_s))
    reader.finish()
    return outcome


def test_an_event_with_text_is_a_token() -> None:
    outcome = read(text("a"), text("b"), usage(2, prompt_tokens_details={"cached_tokens": 1}), DONE)
    assert (outcome.token_times_s, outcome.token_counts) == ([0.0, 1.0], [1, 1])
    assert (outcome.prompt_tokens, outcome.completion_tokens, outcome.cached_tokens) == (3, 2, 1)


def test_a_stream_may_be_cut_anywhere_and_have_other_line_ends_and_comments() -> None:
    stream = b": hello\r\n\r\n" + (text("a") + text("\u00e9") + usage(2) + DONE).replace(b"\n", b"\r\n")
    outcome = read(*(stream[index : index + 1] for index in range(len(stream))))
    assert (outcome.token_counts, outcome.completion_tokens) == ([1, 1], 2)


def test_several_tokens_in_an_event_are_counted_where_the_server_tells() -> None:
    by_ids = read(text("ab", token_ids=[1, 2]), text("c", token_ids=[3]), DONE)
    assert by_ids.token_counts == [2, 1]
    told = [event(choices=[{"text": "x"}], usage={"prompt_tokens": 3, "completion_tokens": n}) for n in (3, 3, 4)]
    by_usage = read(*told, DONE)
    assert (by_usage.token_times_s, by_usage.token_counts, by_usage.output_tokens) == ([0.0, 2.0], [3, 1], 4)


def test_the_usage_wins_where_events_tell_of_fewer() -> None:
    outcome = read(text("ab"), text("cd"), usage(4), DONE)
    assert (sum(outcome.token_counts), outcome.output_tokens) == (2, 4)


def test_events_without_text_count_as_far_as_the_usage_tells_of_more_tokens() -> None:
    opening, final = delta(role="assistant", content=""), delta("length")
    chat = [opening, delta(content="a"), delta(content=""), delta(content="b"), final]
    assert read(*chat, usage(2), DONE).token_times_s == [1.0, 3.0]
    assert read(*chat, usage(3), DONE).token_times_s == [1.0, 2.0, 3.0]
    assert read(*chat, usage(4), DONE).token_times_s == [1.0, 2.0, 3.0, 4.0]
    assert read(*chat, usage(5), DONE).token_times_s == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert read(*chat, DONE).token_times_s == [1.0, 3.0]


def test_reasoning_and_tool_calls_are_tokens() -> None:
    outcome = read(delta(reasoning_content="hm"), delta(tool_calls=[{"index": 0}]), delta(content="a"), DONE)
    assert outcome.token_counts == [1, 1, 1]


def test_an_answer_is_kept_where_a_turn_follows() -> None:
    pieces = [text("a", token_ids=[1]), text("b", token_ids=[2]), DONE]
    kept, dropped = read(*pieces, keeps_answer=True), read(*pieces)
    assert (kept.text, kept.token_ids) == ("ab", [1, 2])
    assert (dropped.text, dropped.token_ids) == ("", [])


@pytest.mark.parametrize(
    ("chunks", "problem"),
    [
        ([text("a")], r"ended without \[DONE\]"),
        ([text("a"), event(error={"message": "the worker died"})], "the worker died"),
        ([b"data: {\n\n"], "an event that is none"),
        ([b"data: 3\n\n"], "an event that is none"),
    ],
)
def test_a_stream_that_fails_is_an_error(chunks: list[bytes], problem: str) -> None:
    with pytest.raises(InternalError, match=problem):
        read(*chunks)
