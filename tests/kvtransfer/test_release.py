"""Releases beside everything else: whose blocks they are, and when they go back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from baton.errors import (
    DuplicateRequestError,
    StaleAttemptError,
)
from kvtransfer.reservation import Reservation
from tests.kvtransfer.frames import (
    CONFIG,
    A,
    B,
    GatedMemory,
    commit,
    fill,
    frame_of,
    in_thread,
    opened,
    payload_of,
    write,
)
from tests.kvtransfer.sides import WAIT_S, DecodeSide, ref, sample


def test_a_release_during_copy_in_takes_effect_after_it(decode: DecodeSide, memory: GatedMemory) -> None:
    ticket = opened(decode, (1, 0, [5]))
    payload = payload_of(1)
    memory.gate.clear()
    writer = in_thread(lambda: write(decode, frame_of(ticket, 0, 1, 0, 0, payload), payload))
    assert memory.entered.acquire(timeout=WAIT_S)

    decode.leader.release(A)
    decode.leader.release(A)
    assert decode.events.of(A) == []
    np.testing.assert_array_equal(decode.pages, decode.before)

    memory.gate.set()
    writer.join()
    assert decode.events.of(A) == ["released"]
    assert decode.pages[0, 5].tobytes() == payload.tobytes()


def test_a_copy_in_that_fails_lets_go_of_what_was_released_meanwhile(
    decode: DecodeSide, memory: GatedMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticket = opened(decode, (1, 0, [5]))
    payload = payload_of(1)

    def copy_in(*arguments: Any) -> int:
        decode.leader.release(A)
        assert decode.events.of(A) == []
        raise MemoryError

    monkeypatch.setattr(memory, "copy_in", copy_in)
    with pytest.raises(MemoryError):
        write(decode, frame_of(ticket, 0, 1, 0, 0, payload), payload)
    assert decode.events.of(A) == ["released"]


def test_a_release_waits_for_the_last_of_several_writers(decode: DecodeSide, memory: GatedMemory) -> None:
    ticket = opened(decode, (1, 0, [5, 6, 7]))
    payload = payload_of(1)
    memory.gate.clear()
    writers = [
        in_thread(lambda seq=seq: write(decode, frame_of(ticket, seq, 1, 0, seq, payload), payload))  # type: ignore[misc]
        for seq in range(3)
    ]
    for _ in writers:
        assert memory.entered.acquire(timeout=WAIT_S)
    decode.leader.release(A)
    late = frame_of(ticket, 3, 1, 1, 0, payload)
    assert isinstance(write(decode, late, payload), StaleAttemptError)
    assert decode.events.of(A) == []
    memory.gate.set()
    for writer in writers:
        writer.join()
    assert decode.events.of(A) == ["released"]
    np.testing.assert_array_equal(decode.pages[1], decode.before[1])


def test_a_late_frame_leaves_the_blocks_of_their_new_owner_alone(decode: DecodeSide) -> None:
    old = opened(decode, (0, 0, [5, 6]))
    decode.leader.release(A)
    decode.events.wait("released", A)
    new = opened(decode, (0, 0, [5, 6]), name=B)
    num_frames = fill(decode, new)
    owned = decode.pages.copy()

    payload = payload_of(2, seed=9)
    refusal = write(decode, frame_of(old, 0, 0, 0, 0, payload), payload)

    assert isinstance(refusal, StaleAttemptError)
    np.testing.assert_array_equal(decode.pages, owned)
    assert sample(decode.registry, "baton_kv_stale_frames_total") == 1
    commit(decode, new, num_frames)
    assert decode.events.of(B) == ["committed"]


def test_a_late_frame_of_an_earlier_attempt_leaves_the_later_one_alone(decode: DecodeSide) -> None:
    old = opened(decode, (0, 0, [5, 6]), name=ref("a", attempt=0))
    decode.leader.release(ref("a", attempt=0))
    new = opened(decode, (0, 0, [5, 6]), name=ref("a", attempt=1))
    assert new.reservation != old.reservation
    payload = payload_of(2)
    for frame in (
        frame_of(old, 0, 0, 0, 0, payload),
        frame_of(new, 0, 0, 0, 0, payload, attempt=0),
        frame_of(old, 0, 0, 0, 0, payload, attempt=1),
    ):
        assert isinstance(write(decode, frame, payload), StaleAttemptError)
    np.testing.assert_array_equal(decode.pages, decode.before)
    commit(decode, new, fill(decode, new))


def test_a_release_that_overtakes_the_outcome_fails_the_commit(
    decode: DecodeSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticket = opened(decode, (1, 0, [5]))
    num_frames = fill(decode, ticket)
    tell = decode.receiver._advance

    def release_first(reservation: Reservation) -> None:
        monkeypatch.undo()
        decode.leader.release(A)
        tell(reservation)

    monkeypatch.setattr(decode.receiver, "_advance", release_first)
    with pytest.raises(StaleAttemptError, match="released before its commit"):
        commit(decode, ticket, num_frames)
    assert decode.events.of(A) == ["released"]


def test_a_release_from_within_committed_comes_after_it(decode: DecodeSide, monkeypatch: pytest.MonkeyPatch) -> None:
    ticket = opened(decode, (1, 0, [5]))
    num_frames = fill(decode, ticket)
    seen: list[list[str]] = []
    remember = decode.events.committed

    def committed(name: Any, first_tokens: Any) -> None:
        decode.leader.release(name)
        seen.append(decode.events.of(name))
        remember(name, first_tokens)

    monkeypatch.setattr(decode.events, "committed", committed)
    commit(decode, ticket, num_frames)
    assert seen == [[]]
    assert decode.events.of(A) == ["committed", "released"]


def test_release_is_idempotent_and_unknown_refs_are_nothing(decode: DecodeSide) -> None:
    decode.leader.release(A)
    opened(decode, (1, 0, [5]))
    assert sample(decode.registry, "baton_kv_reservations") == 1
    decode.leader.release(A)
    decode.leader.release(A)
    assert decode.events.log == [("released", A)]
    assert sample(decode.registry, "baton_kv_reservations") == 0


def test_a_ref_has_one_reservation_at_a_time_and_ids_are_never_reused(decode: DecodeSide) -> None:
    ids = set()
    for _ in range(3):
        ids.add(decode.reserve(A).reservation)
        with pytest.raises(DuplicateRequestError):
            decode.reserve(A)
        decode.leader.release(A)
    assert len(ids) == 3


def test_incarnations_of_a_worker_share_no_reservation_id(make_decode: Callable[..., DecodeSide]) -> None:
    first, second = (make_decode(CONFIG, epoch=epoch) for epoch in (7, 8))
    assert first.reserve(A).reservation != second.reserve(A).reservation
