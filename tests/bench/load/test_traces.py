"""Recorded traffic: how it is read, cut and scaled, and that shared prefixes are the same tokens."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import pytest

from bench.load.traces import BLOCK_TOKENS, Replay, Row, read_azure, read_mooncake, trace_requests
from bench.load.workloads import Vocabulary

VOCABULARY = Vocabulary(100, 1000)


def row(at_ms: int, num_input: int, num_output: int, *hash_ids: int) -> dict[str, Any]:
    return {"timestamp": at_ms, "input_length": num_input, "output_length": num_output, "hash_ids": hash_ids}


@pytest.fixture
def mooncake(tmp_path: pathlib.Path) -> pathlib.Path:
    rows = [row(0, 1100, 5, 0, 1, 2), row(1500, 1536, 600, 0, 1, 3), row(4000, 20, 1, 9), row(4500, 1024, 7, 0, 4)]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def prompts(rows: Sequence[Row], replay: Replay, seed: int = 0) -> list[list[int]]:
    return [list(request.prompt) for request in trace_requests(rows, replay, VOCABULARY, seed)]  # type: ignore[arg-type]


def test_mooncake_rows_keep_their_times_and_lengths(mooncake: pathlib.Path) -> None:
    replay = Replay()
    requests = list(trace_requests(replay.select(read_mooncake(mooncake)), replay, VOCABULARY, seed=0))
    assert [request.arrival_s for request in requests] == [0.0, 1.5, 4.0, 4.5]
    assert [len(request.prompt) for request in requests] == [1100, 1536, 20, 1024]
    assert [request.max_tokens for request in requests] == [5, 600, 1, 7]


def test_equal_hash_ids_are_equal_tokens_and_others_differ(mooncake: pathlib.Path) -> None:
    first, second, third, fourth = prompts(read_mooncake(mooncake), Replay())
    assert first[: 2 * BLOCK_TOKENS] == second[: 2 * BLOCK_TOKENS]
    assert first[2 * BLOCK_TOKENS :] != second[2 * BLOCK_TOKENS :][: len(first) - 2 * BLOCK_TOKENS]
    assert fourth[:BLOCK_TOKENS] == first[:BLOCK_TOKENS]
    assert fourth[BLOCK_TOKENS:] != first[BLOCK_TOKENS : 2 * BLOCK_TOKENS]
    assert third != first[:20]
    assert prompts(read_mooncake(mooncake), Replay(), seed=1)[0] != first


def test_scaled_prompts_share_scaled_prefixes(mooncake: pathlib.Path) -> None:
    first, second, _, fourth = prompts(read_mooncake(mooncake), Replay(length_scale=0.1))
    assert [len(first), len(second), len(fourth)] == [110, 154, 102]
    assert first[:102] == second[:102]
    assert fourth[:51] == first[:51]
    assert fourth[51:] != first[51:102]


def test_a_part_of_a_trace_begins_at_zero(mooncake: pathlib.Path) -> None:
    rows = Replay(start_s=1.0, end_s=4.5).select(read_mooncake(mooncake))
    assert [row.timestamp_s for row in rows] == [0.5, 3.0]
    assert [row.timestamp_s for row in Replay(max_rows=3).select(read_mooncake(mooncake))] == [0.0, 1.5, 4.0]


def test_time_is_scaled(mooncake: pathlib.Path) -> None:
    replay = Replay(time_scale=0.5)
    requests = trace_requests(replay.select(read_mooncake(mooncake)), replay, VOCABULARY, seed=0)
    assert [request.arrival_s for request in requests] == [0.0, 0.75, 2.0, 2.25]


def test_lengths_are_cut_to_what_is_asked_and_to_what_the_model_takes() -> None:
    long = Row(0.0, 5000, 900)
    assert Replay(max_input_tokens=1000, max_output_tokens=100).lengths(long) == (1000, 100)
    assert Replay(max_model_len=2048).lengths(long) == (1148, 900)
    assert Replay(max_model_len=512).lengths(long) == (1, 511)
    assert Replay(length_scale=0.0001).lengths(long) == (1, 1)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (json.dumps(row(0, 513, 1, 0)), "has 1 hash_ids for 513 tokens, must have 2"),
        (json.dumps({"timestamp": 0}), "lacks 'input_length'"),
        ("no json", "Expecting value"),
    ],
)
def test_a_line_that_is_none_is_named(tmp_path: pathlib.Path, line: str, problem: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps(row(0, 512, 1, 0)) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=rf"trace\.jsonl:2: {problem}"):
        read_mooncake(path)


def test_azure_rows_have_times_from_the_first_and_no_prefixes(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n2023-11-16 18:16:46.6805900,374,1\n"
    )
    rows = Replay().select(read_azure(path))
    assert [row.timestamp_s for row in rows] == pytest.approx([0.0, 4.314579, 60.0], abs=1e-5)
    assert [(row.input_tokens, row.output_tokens) for row in rows] == [(374, 44), (396, 109), (374, 1)]
    first, _, third = prompts(rows, Replay())
    assert len(first) == len(third) == 374
    assert first != third


def test_a_line_of_azures_that_is_none_is_named(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n")
    with pytest.raises(ValueError, match=r"trace\.csv:2: Invalid isoformat"):
        read_azure(path)
