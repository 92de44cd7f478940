"""Recorded traffic as requests: when they came, how long they were, and which prefixes they shared.

Mooncake (FAST'25; JSON lines): `timestamp` in ms, `input_length`, `output_length`, and `hash_ids`, one for each block
of 512 tokens of the prompt, the last of which may be partial. An id stands for the block and all before it, so equal
ids are equal tokens at equal places. Azure's LLM inference traces (CSV): TIMESTAMP, ContextTokens, GeneratedTokens.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import functools
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np

from bench.load.requests import LoadRequest
from bench.load.workloads import Vocabulary

Line = TypeVar("Line")

BLOCK_TOKENS = 512
# Blocks of tokens that are kept since a prefix comes again soon; all others are made anew.
_KEPT_BLOCKS = 4096


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One request of a trace; `hash_ids` is empty where the trace has no prefixes."""

    timestamp_s: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Replay:
    """How a trace is played.

    Attributes:
        start_s, end_s: the part of the trace, in its own seconds from its first row; `end_s` is not included.
        max_rows: of that part, how many rows; None for all.
        time_scale: what the gaps between rows are multiplied with; 0.5 is twice as fast.
        length_scale: what prompts and answers are multiplied with, block by block, so that prefixes stay shared.
        max_input_tokens, max_output_tokens: what is longer is cut to this.
        max_model_len: prompts are cut further, so that prompt and answer fit together.
    """

    start_s: float = 0.0
    end_s: float | None = None
    max_rows: int | None = None
    time_scale: float = 1.0
    length_scale: float = 1.0
    max_input_tokens: int | None = None
    max_output_tokens: int | None = None
    max_model_len: int | None = None

    def select(self, rows: Iterable[Row]) -> list[Row]:
        """The rows that are played, with their times from the start of that part."""
        ordered = sorted(rows, key=lambda row: row.timestamp_s)
        end_s = float("inf") if self.end_s is None else self.end_s
        chosen = itertools.islice(
            (row for row in ordered if self.start_s <= row.timestamp_s - ordered[0].timestamp_s < end_s), self.max_rows
        )
        return [
            dataclasses.replace(row, timestamp_s=row.timestamp_s - ordered[0].timestamp_s - self.start_s)
            for row in chosen
        ]

    def lengths(self, row: Row) -> tuple[int, int]:
        """Tokens of prompt and answer, both at least 1."""
        num_output = _capped(max(1, round(row.output_tokens * self.length_scale)), self.max_output_tokens)
        num_input = _capped(max(1, round(row.input_tokens * self.length_scale)), self.max_input_tokens)
        if self.max_model_len is not None:
            num_output = _capped(num_output, self.max_model_len - 1)
            num_input = _capped(num_input, self.max_model_len - num_output)
        return num_input, num_output

    @property
    def block_tokens(self) -> int:
        """Tokens of a whole block of the trace after scaling."""
        return max(1, round(BLOCK_TOKENS * self.length_scale))


def trace_requests(rows: Iterable[Row], replay: Replay, vocabulary: Vocabulary, seed: int) -> Iterator[LoadRequest]:
    """The rows of `replay.select` as requests at their times, made as they are gone through.

    The tokens of a block are a function of its hash id and the seed. Where a row has no hash ids its prompt is drawn.
    """
    block_of = functools.lru_cache(_KEPT_BLOCKS)(_blocks(vocabulary, replay.block_tokens, seed))
    generator = np.random.default_rng(seed)
    for row in rows:
        num_input, num_output = replay.lengths(row)
        if row.hash_ids:
            prompt = list(itertools.chain.from_iterable(map(block_of, row.hash_ids)))[:num_input]
            # Rounding may leave a scaled prompt a little longer than its blocks.
            prompt += vocabulary.draw(generator, num_input - len(prompt))
        else:
            prompt = vocabulary.draw(generator, num_input)
        yield LoadRequest(prompt, num_output, row.timestamp_s * replay.time_scale)


def read_mooncake(path: str | os.PathLike[str]) -> list[Row]:
    """Reads JSON lines.

    Raises:
        ValueError: a line is none of the trace's; the message names it.
    """
    with open(path, encoding="utf-8") as file:
        numbered = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        return [_row(path, number, line, _mooncake_row) for number, line in numbered]


def read_azure(path: str | os.PathLike[str]) -> list[Row]:
    """Reads CSV with a head.

    Raises:
        ValueError: a line is none of the trace's; the message names it.
    """
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = csv.DictReader(file)
        return [_row(path, lines.line_num, line, _azure_row) for line in lines]


READERS: dict[str, Callable[[str], list[Row]]] = {"mooncake": read_mooncake, "azure": read_azure}


def _mooncake_row(line: str) -> Row:
    found = json.loads(line)
    row = Row(
        found["timestamp"] / 1e3, found["input_length"], found["output_length"], tuple(map(int, found["hash_ids"]))
    )
    num_blocks = -(-row.input_tokens // BLOCK_TOKENS)
    if len(row.hash_ids) != num_blocks:
        raise ValueError(f"has {len(row.hash_ids)} hash_ids for {row.input_tokens} tokens, must have {num_blocks}")
    return row


def _azure_row(found: dict[str, str]) -> Row:
    # Seven decimals, where Python reads six.
    timestamp = datetime.datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", found["TIMESTAMP"]))
    seconds = timestamp.replace(tzinfo=timestamp.tzinfo or datetime.UTC).timestamp()
    return Row(seconds, int(found["ContextTokens"]), int(found["GeneratedTokens"]))


def _row(path: str | os.PathLike[str], number: int, line: Line, read: Callable[[Line], Row]) -> Row:
    try:
        return read(line)
    except KeyError as error:
        raise ValueError(f"{os.fspath(path)}:{number}: lacks {error}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{os.fspath(path)}:{number}: {error}") from error


def _blocks(vocabulary: Vocabulary, num_tokens: int, seed: int) -> Callable[[int], list[int]]:
    return lambda hash_id: vocabulary.draw(np.random.default_rng((seed, hash_id)), num_tokens)


def _capped(number: int, limit: int | None) -> int:
    return number if limit is None else min(number, limit)
