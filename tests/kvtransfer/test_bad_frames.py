"""Frames that are late, wrong or another's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from baton.errors import (
    StaleAttemptError,
    TransferError,
)
from kvtransfer.reservation import Origin
from tests.kvtransfer.frames import CONFIG, A, commit, fill, frame_of, let_in, opened, payload_of, write
from tests.kvtransfer.sides import DecodeSide, sample


@pytest.fixture
def decode() -> Iterator[DecodeSide]:
    side = DecodeSide(CONFIG)
    yield side
    side.close()


def test_frames_of_another_sender_or_before_open_are_stale_and_do_no_harm(decode: DecodeSide) -> None:
    ticket = decode.reserve(A, (1, 0, [5]))
    payload = payload_of(1)
    frame = frame_of(ticket, 0, 1, 0, 0, payload)
    assert isinstance(write(decode, frame, payload), StaleAttemptError)
    let_in(decode, ticket)
    assert isinstance(write(decode, frame, payload, Origin("prefill-0", 1)), StaleAttemptError)
    np.testing.assert_array_equal(decode.pages, decode.before)
    commit(decode, ticket, fill(decode, ticket))


def test_a_corrupt_frame_ends_the_transfer(decode: DecodeSide) -> None:
    ticket = opened(decode, (1, 0, [5]))
    payload = payload_of(1)
    frame = frame_of(ticket, 0, 1, 0, 0, payload)
    payload[17] ^= 64
    refusal = write(decode, frame, payload)
    assert isinstance(refusal, TransferError)
    assert "corrupt" in refusal.message
    with pytest.raises(TransferError) as raised:
        commit(decode, ticket, 2)
    assert raised.value is refusal
    assert decode.events.of(A) == ["aborted"]
    assert sample(decode.registry, "baton_kv_transfer_failures_total", reason="checksum") == 1
    assert sample(decode.registry, "baton_kv_received_bytes_total", transport="grpc") == 0


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"seq": 0}, "frame 0 came twice"),
        ({"slot": 0}, "another frame has sent"),
        ({"slot": 2}, "not asked for"),
        ({"group": 0}, "not asked for"),
        ({"group": 9}, "not asked for"),
        ({"first_block": 5}, "not asked for"),
        ({"first_block": 3}, "not asked for"),
        ({"num_blocks": 3}, "not asked for"),
        ({"num_blocks": 0}, "not asked for"),
        ({"num_blocks": 2**32 - 1}, "not asked for"),
        ({"num_blocks": 1}, "bytes for 1 pages"),
    ],
)
def test_a_frame_that_was_not_asked_for_is_not_written(
    decode: DecodeSide, changes: dict[str, Any], problem: str
) -> None:
    """The first frame, of slot 0, is right; the second would be right for slot 1 but for `changes`."""
    ticket = opened(decode, (1, 4, [5, 6]))
    payload = payload_of(2)
    assert write(decode, frame_of(ticket, 0, 1, 0, 4, payload), payload) is None
    after_first = decode.pages.copy()
    other = payload_of(2, seed=4)
    refusal = write(decode, frame_of(ticket, 1, 1, 1, 4, other)._replace(**changes), other)
    assert isinstance(refusal, TransferError)
    assert problem in refusal.message
    np.testing.assert_array_equal(decode.pages, after_first)
    assert decode.events.of(A) == ["aborted"]


def test_a_duplicate_after_the_commit_is_stale_and_changes_nothing(decode: DecodeSide) -> None:
    ticket = opened(decode, (1, 0, [5]))
    commit(decode, ticket, fill(decode, ticket))
    committed = decode.pages.copy()
    payload = payload_of(1, seed=8)
    assert isinstance(write(decode, frame_of(ticket, 0, 1, 0, 0, payload), payload), StaleAttemptError)
    np.testing.assert_array_equal(decode.pages, committed)
    assert decode.events.of(A) == ["committed"]
