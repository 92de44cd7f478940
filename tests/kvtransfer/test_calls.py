"""Tickets, and the order of Open, Commit and Abort."""

from __future__ import annotations

import numpy as np
import pytest

from baton import wire
from baton.errors import (
    LayoutMismatchError,
    StaleAttemptError,
    TransferError,
    UnavailableError,
)
from kvtransfer.reservation import Origin
from kvtransfer.ticket import layout_fingerprint
from tests.kvtransfer.frames import (
    A,
    GatedMemory,
    abort,
    commit,
    fill,
    frame_of,
    in_thread,
    let_in,
    opened,
    payload_of,
    write,
)
from tests.kvtransfer.sides import HYBRID, WAIT_S, DecodeSide, ref


def test_a_ticket_says_all_that_a_sender_needs(decode: DecodeSide) -> None:
    ticket = decode.leader.reserve(A, 75, 16, [(0, 2, [9, 4, 5]), (1, 8, [6, 7])])
    assert wire.ref_from_wire(ticket.ref) == A
    assert (ticket.worker, ticket.epoch, ticket.num_tokens, ticket.cached_tokens) == ("decode-0", 1, 75, 16)
    assert [(r.group, r.first_block, r.num_blocks) for r in ticket.ranges] == [(0, 2, 3), (1, 8, 2)]
    assert ticket.layout == layout_fingerprint(HYBRID, model="model")
    (shard,) = ticket.shards
    assert (shard.first_head, shard.num_heads) == (0, HYBRID.num_kv_heads)
    assert [offer.transport for offer in shard.offers] == ["grpc"]
    assert ticket.lease_ms == 15_000
    assert ticket.control_address


def test_one_sender_incarnation_is_let_in(decode: DecodeSide) -> None:
    ticket = opened(decode, (1, 0, [5]))
    let_in(decode, ticket)
    for other in (Origin("prefill-1", 2), Origin("prefill-0", 3)):
        with pytest.raises(StaleAttemptError, match="open for prefill-0"):
            let_in(decode, ticket, other)
    fill(decode, ticket)
    with pytest.raises(StaleAttemptError):
        let_in(decode, ticket)


def test_open_names_reservation_and_attempt(decode: DecodeSide) -> None:
    ticket = decode.reserve(ref("a", attempt=1), (1, 0, [5]))
    for wrong in (
        {"ref": wire.ref_to_wire(ref("a", attempt=0))},
        {"ref": wire.ref_to_wire(ref("b", attempt=1))},
        {"reservation": ticket.reservation + 1},
    ):
        with pytest.raises(StaleAttemptError):
            let_in(decode, ticket, **wrong)
    let_in(decode, ticket)


def test_a_different_layout_is_refused_by_name(decode: DecodeSide) -> None:
    ticket = decode.reserve(A, (1, 0, [5]))
    other = layout_fingerprint(HYBRID, model="another")
    with pytest.raises(LayoutMismatchError, match="model is 'model' here and 'another' at the peer"):
        let_in(decode, ticket, layout=other)


def test_a_commit_does_not_wait_for_what_has_not_arrived(decode: DecodeSide, memory: GatedMemory) -> None:
    ticket = opened(decode, (1, 0, [5]))
    payload = payload_of(1)
    assert write(decode, frame_of(ticket, 0, 1, 0, 0, payload), payload) is None
    memory.gate.clear()
    assert memory.entered.acquire(timeout=WAIT_S)
    writer = in_thread(lambda: write(decode, frame_of(ticket, 1, 1, 1, 0, payload), payload))
    assert memory.entered.acquire(timeout=WAIT_S)
    with pytest.raises(TransferError, match="committed 2 frames; 1 arrived and 1 pages are missing"):
        commit(decode, ticket, 2)
    memory.gate.set()
    writer.join()
    assert decode.events.of(A) == ["aborted"]


def test_a_commit_before_open_is_stale(decode: DecodeSide) -> None:
    with pytest.raises(StaleAttemptError):
        commit(decode, decode.reserve(A), 0)


def test_a_second_commit_is_stale(decode: DecodeSide) -> None:
    ticket = opened(decode, (1, 0, [5]))
    commit(decode, ticket, fill(decode, ticket))
    with pytest.raises(StaleAttemptError):
        commit(decode, ticket, 2)


def test_a_commit_after_the_release_is_stale(decode: DecodeSide) -> None:
    ticket = opened(decode, (1, 0, [5]))
    num_frames = fill(decode, ticket)
    decode.leader.release(A)
    with pytest.raises(StaleAttemptError):
        commit(decode, ticket, num_frames)
    assert decode.events.of(A) == ["released"]


def test_a_commit_of_fewer_frames_than_came_fails(decode: DecodeSide) -> None:
    ticket = opened(decode, (1, 0, [5]))
    fill(decode, ticket)
    with pytest.raises(TransferError, match="committed 1 frames; 2 arrived"):
        commit(decode, ticket, 1)
    assert decode.events.of(A) == ["aborted"]


def test_a_commit_of_a_failed_transfer_says_what_failed(decode: DecodeSide) -> None:
    ticket = opened(decode, (1, 0, [5]))
    payload = payload_of(1)
    write(decode, frame_of(ticket, 0, 1, 0, 0, payload, checksum=1), payload)
    with pytest.raises(TransferError, match="frame 0 is corrupt"):
        commit(decode, ticket, 2)


def test_abort_is_told_once(decode: DecodeSide) -> None:
    ticket = opened(decode, (1, 0, [5]))
    abort(decode, ticket, "the scheduler changed its mind")
    abort(decode, ticket)
    assert decode.events.log == [("aborted", A)]
    assert decode.events.reasons[A] == "aborted: the scheduler changed its mind"
    with pytest.raises(TransferError, match="changed its mind"):
        commit(decode, ticket, 2)
    decode.leader.release(A)
    abort(decode, ticket)
    assert decode.events.of(A) == ["aborted", "released"]


def test_an_abort_may_come_before_open(decode: DecodeSide) -> None:
    ticket = decode.reserve(A, (1, 0, [5]))
    abort(decode, ticket)
    assert decode.events.of(A) == ["aborted"]
    with pytest.raises(StaleAttemptError):
        let_in(decode, ticket)


def test_an_abort_after_the_commit_changes_nothing(decode: DecodeSide) -> None:
    ticket = opened(decode, (1, 0, [5]))
    commit(decode, ticket, fill(decode, ticket))
    abort(decode, ticket)
    assert decode.events.of(A) == ["committed"]


def test_what_comes_after_closing_is_refused(decode: DecodeSide) -> None:
    ticket = opened(decode, (1, 0, [5]))
    decode.receiver.close()
    decode.receiver.close()
    payload = payload_of(1)
    assert isinstance(write(decode, frame_of(ticket, 0, 1, 0, 0, payload), payload), UnavailableError)
    with pytest.raises(UnavailableError):
        let_in(decode, ticket)
    with pytest.raises(UnavailableError):
        commit(decode, ticket, 0)
    np.testing.assert_array_equal(decode.pages, decode.before)
