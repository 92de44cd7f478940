"""Races and refusals of the receiver, step by step: the tests are the data plane's threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import xxhash

from baton import wire
from baton.config import TransferConfig
from baton.errors import (
    BatonError,
    DuplicateRequestError,
    LayoutMismatchError,
    StaleAttemptError,
    TransferError,
    UnavailableError,
)
from baton.internal.v1 import transfer_pb2
from kvtransfer.frame import Frame
from kvtransfer.pages import BlockIds, Bytes, PageMemory
from kvtransfer.reservation import Origin
from kvtransfer.ticket import layout_fingerprint
from tests.kvtransfer.sides import HYBRID, WAIT_S, DecodeSide, ref, sample

CONFIG = TransferConfig(transports=("grpc",))
SENDER = Origin("prefill-0", 2)
A, B = ref("a"), ref("b")


class GatedMemory(PageMemory):
    """Once shut, stops every copy-in between its check and its write until the gate opens."""

    def __init__(self, pages: Bytes) -> None:
        super().__init__(pages)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)

    def copy_in(self, slot: int, block_ids: BlockIds, payload: Bytes) -> None:
        self.entered.release()
        assert self.gate.wait(WAIT_S)
        super().copy_in(slot, block_ids, payload)


@pytest.fixture
def decode() -> Iterator[DecodeSide]:
    side = DecodeSide(CONFIG, make_memory=GatedMemory)
    yield side
    side.close()


@pytest.fixture
def memory(decode: DecodeSide) -> GatedMemory:
    assert isinstance(decode.memory, GatedMemory)
    return decode.memory


def open_request(ticket: transfer_pb2.Ticket, origin: Origin = SENDER, **changes: Any) -> transfer_pb2.OpenRequest:
    fields: dict[str, Any] = {
        "ref": ticket.ref,
        "reservation": ticket.reservation,
        "layout": ticket.layout,
        "transport": "grpc",
    }
    return transfer_pb2.OpenRequest(sender=origin.sender, sender_epoch=origin.epoch, **(fields | changes))


def opened(decode: DecodeSide, *blocks: tuple[int, int, list[int]], name: Any = A) -> transfer_pb2.Ticket:
    ticket = decode.reserve(name, *blocks)
    decode.receiver.open(open_request(ticket))
    return ticket


def payload_of(num_blocks: int, seed: int = 3) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, num_blocks * HYBRID.page_bytes, dtype=np.uint8)


def frame_of(
    ticket: transfer_pb2.Ticket, seq: int, group: int, slot: int, first_block: int, payload: Bytes, **changes: int
) -> Frame:
    return Frame(
        reservation=ticket.reservation,
        attempt=ticket.ref.attempt,
        seq=seq,
        group=group,
        slot=slot,
        first_block=first_block,
        num_blocks=len(payload) // HYBRID.page_bytes,
        payload_bytes=len(payload),
        checksum=xxhash.xxh3_64_intdigest(payload.data),
    )._replace(**changes)


def write(decode: DecodeSide, frame: Frame, payload: Bytes, origin: Origin = SENDER) -> BatonError | None:
    return decode.receiver.write(frame, payload, origin, "grpc")


def fill(decode: DecodeSide, ticket: transfer_pb2.Ticket) -> int:
    """Writes every page that the ticket asks for, a frame for each slot; returns the number of frames."""
    seq = 0
    for wanted in ticket.ranges:
        for slot in range(len(HYBRID.groups[wanted.group].layers)):
            payload = payload_of(wanted.num_blocks)
            assert (
                write(decode, frame_of(ticket, seq, wanted.group, slot, wanted.first_block, payload), payload) is None
            )
            seq += 1
    return seq


class Answers(list[BatonError | None]):
    """The answers of one Commit."""

    def __call__(self, error: BatonError | None) -> None:
        self.append(error)


def commit(decode: DecodeSide, ticket: transfer_pb2.Ticket, num_frames: int) -> Answers:
    answers = Answers()
    request = transfer_pb2.CommitRequest(ref=ticket.ref, reservation=ticket.reservation, num_frames=num_frames)
    decode.receiver.commit(request, answers)
    return answers


def abort(decode: DecodeSide, ticket: transfer_pb2.Ticket, reason: str = "why not") -> None:
    decode.receiver.abort(transfer_pb2.AbortRequest(ref=ticket.ref, reservation=ticket.reservation, reason=reason))


def in_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call)
    thread.start()
    return thread


def test_a_ticket_says_all_that_a_sender_needs(decode: DecodeSide) -> None:
    ticket = decode.receiver.reserve(A, 75, 16, [(0, 2, [9, 4, 5]), (1, 8, [6, 7])])
    assert wire.ref_from_wire(ticket.ref) == A
    assert (ticket.worker, ticket.epoch, ticket.num_tokens, ticket.cached_tokens) == ("decode-0", 1, 75, 16)
    assert [(r.group, r.first_block, r.num_blocks) for r in ticket.ranges] == [(0, 2, 3), (1, 8, 2)]
    assert ticket.layout == layout_fingerprint(HYBRID, model="model")
    assert [offer.transport for offer in ticket.offers] == ["grpc"]
    assert ticket.lease_ms == 15_000
    assert ticket.control_address


# Races


def test_a_release_during_copy_in_takes_effect_after_it(decode: DecodeSide, memory: GatedMemory) -> None:
    ticket = opened(decode, (1, 0, [5]))
    payload = payload_of(1)
    memory.gate.clear()
    writer = in_thread(lambda: write(decode, frame_of(ticket, 0, 1, 0, 0, payload), payload))
    assert memory.entered.acquire(timeout=WAIT_S)

    decode.receiver.release(A)
    decode.receiver.release(A)
    assert decode.events.of(A) == []
    np.testing.assert_array_equal(decode.pages, decode.before)

    memory.gate.set()
    writer.join()
    assert decode.events.of(A) == ["released"]
    assert decode.pages[0, 5].tobytes() == payload.tobytes()


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
    decode.receiver.release(A)
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
    decode.receiver.release(A)
    decode.events.wait("released", A)
    new = opened(decode, (0, 0, [5, 6]), name=B)
    num_frames = fill(decode, new)
    owned = decode.pages.copy()

    payload = payload_of(2, seed=9)
    refusal = write(decode, frame_of(old, 0, 0, 0, 0, payload), payload)

    assert isinstance(refusal, StaleAttemptError)
    np.testing.assert_array_equal(decode.pages, owned)
    assert sample(decode.registry, "baton_kv_stale_frames_total") == 1
    assert commit(decode, new, num_frames) == [None]
    assert decode.events.of(B) == ["committed"]


def test_a_late_frame_of_an_earlier_attempt_leaves_the_later_one_alone(decode: DecodeSide) -> None:
    old = opened(decode, (0, 0, [5, 6]), name=ref("a", attempt=0))
    decode.receiver.release(ref("a", attempt=0))
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
    assert commit(decode, new, fill(decode, new)) == [None]


def test_a_commit_waits_for_the_last_frame(decode: DecodeSide, memory: GatedMemory) -> None:
    ticket = opened(decode, (1, 0, [5]))
    payload = payload_of(1)
    assert write(decode, frame_of(ticket, 0, 1, 0, 0, payload), payload) is None
    answers = commit(decode, ticket, 2)
    memory.gate.clear()
    assert memory.entered.acquire(timeout=WAIT_S)
    writer = in_thread(lambda: write(decode, frame_of(ticket, 1, 1, 1, 0, payload), payload))
    assert memory.entered.acquire(timeout=WAIT_S)
    assert answers == []
    assert decode.events.of(A) == []

    memory.gate.set()
    writer.join()
    assert answers == [None]
    assert decode.events.of(A) == ["committed"]


def test_a_release_beside_a_waiting_commit_fails_it(decode: DecodeSide) -> None:
    ticket = opened(decode, (1, 0, [5]))
    answers = commit(decode, ticket, 2)
    decode.receiver.release(A)
    assert len(answers) == 1
    assert isinstance(answers[0], StaleAttemptError)
    assert decode.events.of(A) == ["released"]


def test_a_release_from_within_committed_comes_after_it(decode: DecodeSide, monkeypatch: pytest.MonkeyPatch) -> None:
    ticket = opened(decode, (1, 0, [5]))
    num_frames = fill(decode, ticket)
    seen: list[list[str]] = []
    remember = decode.events.committed

    def committed(name: Any, first_tokens: Any) -> None:
        decode.receiver.release(name)
        seen.append(decode.events.of(name))
        remember(name, first_tokens)

    monkeypatch.setattr(decode.events, "committed", committed)
    assert commit(decode, ticket, num_frames) == [None]
    assert seen == [[]]
    assert decode.events.of(A) == ["committed", "released"]


# What may come once


def test_release_is_idempotent_and_unknown_refs_are_nothing(decode: DecodeSide) -> None:
    decode.receiver.release(A)
    opened(decode, (1, 0, [5]))
    assert sample(decode.registry, "baton_kv_reservations") == 1
    decode.receiver.release(A)
    decode.receiver.release(A)
    assert decode.events.log == [("released", A)]
    assert sample(decode.registry, "baton_kv_reservations") == 0


def test_a_ref_has_one_reservation_at_a_time_and_ids_are_never_reused(decode: DecodeSide) -> None:
    ids = set()
    for _ in range(3):
        ids.add(decode.reserve(A).reservation)
        with pytest.raises(DuplicateRequestError):
            decode.reserve(A)
        decode.receiver.release(A)
    assert len(ids) == 3


def test_incarnations_of_a_worker_share_no_reservation_id(make_decode: Callable[..., DecodeSide]) -> None:
    first, second = (make_decode(CONFIG, epoch=epoch) for epoch in (7, 8))
    assert first.reserve(A).reservation != second.reserve(A).reservation


def test_abort_is_told_once(decode: DecodeSide) -> None:
    ticket = opened(decode, (1, 0, [5]))
    answers = commit(decode, ticket, 2)
    abort(decode, ticket, "the scheduler changed its mind")
    abort(decode, ticket)
    assert decode.events.log == [("aborted", A)]
    assert decode.events.reasons[A] == "aborted: the scheduler changed its mind"
    assert len(answers) == 1
    assert isinstance(answers[0], TransferError)
    decode.receiver.release(A)
    abort(decode, ticket)
    assert decode.events.of(A) == ["aborted", "released"]


def test_an_abort_may_come_before_open(decode: DecodeSide) -> None:
    ticket = decode.reserve(A, (1, 0, [5]))
    abort(decode, ticket)
    assert decode.events.of(A) == ["aborted"]
    with pytest.raises(StaleAttemptError):
        decode.receiver.open(open_request(ticket))


def test_an_abort_after_the_commit_changes_nothing(decode: DecodeSide) -> None:
    ticket = opened(decode, (1, 0, [5]))
    assert commit(decode, ticket, fill(decode, ticket)) == [None]
    abort(decode, ticket)
    assert decode.events.of(A) == ["committed"]


def test_a_second_commit_is_stale(decode: DecodeSide) -> None:
    ticket = opened(decode, (1, 0, [5]))
    waiting = commit(decode, ticket, 2)
    with pytest.raises(StaleAttemptError):
        commit(decode, ticket, 2)
    fill(decode, ticket)
    assert waiting == [None]
    with pytest.raises(StaleAttemptError):
        commit(decode, ticket, 2)


def test_a_commit_after_the_release_is_stale(decode: DecodeSide) -> None:
    ticket = opened(decode, (1, 0, [5]))
    num_frames = fill(decode, ticket)
    decode.receiver.release(A)
    with pytest.raises(StaleAttemptError):
        commit(decode, ticket, num_frames)
    assert decode.events.of(A) == ["released"]


def test_a_commit_before_open_is_stale(decode: DecodeSide) -> None:
    with pytest.raises(StaleAttemptError):
        commit(decode, decode.reserve(A), 0)


# Who may open


def test_one_sender_incarnation_is_let_in(decode: DecodeSide) -> None:
    ticket = opened(decode, (1, 0, [5]))
    decode.receiver.open(open_request(ticket))
    for other in (Origin("prefill-1", 2), Origin("prefill-0", 3)):
        with pytest.raises(StaleAttemptError, match="open for prefill-0"):
            decode.receiver.open(open_request(ticket, other))
    fill(decode, ticket)
    with pytest.raises(StaleAttemptError):
        decode.receiver.open(open_request(ticket))


def test_open_names_reservation_and_attempt(decode: DecodeSide) -> None:
    ticket = decode.reserve(ref("a", attempt=1), (1, 0, [5]))
    for wrong in (
        {"ref": wire.ref_to_wire(ref("a", attempt=0))},
        {"ref": wire.ref_to_wire(ref("b", attempt=1))},
        {"reservation": ticket.reservation + 1},
    ):
        with pytest.raises(StaleAttemptError):
            decode.receiver.open(open_request(ticket, **wrong))
    decode.receiver.open(open_request(ticket))


def test_a_different_layout_is_refused_by_name(decode: DecodeSide) -> None:
    ticket = decode.reserve(A, (1, 0, [5]))
    other = layout_fingerprint(HYBRID, model="another")
    with pytest.raises(LayoutMismatchError, match="model is 'model' here and 'another' at the peer"):
        decode.receiver.open(open_request(ticket, layout=other))


# Frames that are refused


def test_frames_of_another_sender_or_before_open_are_stale_and_do_no_harm(decode: DecodeSide) -> None:
    ticket = decode.reserve(A, (1, 0, [5]))
    payload = payload_of(1)
    frame = frame_of(ticket, 0, 1, 0, 0, payload)
    assert isinstance(write(decode, frame, payload), StaleAttemptError)
    decode.receiver.open(open_request(ticket))
    assert isinstance(write(decode, frame, payload, Origin("prefill-0", 1)), StaleAttemptError)
    np.testing.assert_array_equal(decode.pages, decode.before)
    assert commit(decode, ticket, fill(decode, ticket)) == [None]


def test_a_corrupt_frame_ends_the_transfer(decode: DecodeSide) -> None:
    ticket = opened(decode, (1, 0, [5]))
    answers = commit(decode, ticket, 2)
    payload = payload_of(1)
    frame = frame_of(ticket, 0, 1, 0, 0, payload)
    payload[17] ^= 64
    refusal = write(decode, frame, payload)
    assert isinstance(refusal, TransferError)
    assert "corrupt" in refusal.message
    assert answers == [refusal]
    assert decode.events.of(A) == ["aborted"]
    assert sample(decode.registry, "baton_kv_transfer_failures_total", reason="checksum") == 1
    assert sample(decode.registry, "baton_kv_received_bytes_total", transport="grpc") == 0


def test_a_commit_of_a_failed_transfer_says_what_failed(decode: DecodeSide) -> None:
    ticket = opened(decode, (1, 0, [5]))
    payload = payload_of(1)
    write(decode, frame_of(ticket, 0, 1, 0, 0, payload, checksum=1), payload)
    with pytest.raises(TransferError, match="frame 0 is corrupt"):
        commit(decode, ticket, 2)


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
    decode: DecodeSide, changes: dict[str, int], problem: str
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
    assert commit(decode, ticket, fill(decode, ticket)) == [None]
    committed = decode.pages.copy()
    payload = payload_of(1, seed=8)
    assert isinstance(write(decode, frame_of(ticket, 0, 1, 0, 0, payload), payload), StaleAttemptError)
    np.testing.assert_array_equal(decode.pages, committed)
    assert decode.events.of(A) == ["committed"]


def test_a_commit_of_fewer_frames_than_came_fails(decode: DecodeSide) -> None:
    ticket = opened(decode, (1, 0, [5]))
    fill(decode, ticket)
    (error,) = commit(decode, ticket, 1)
    assert isinstance(error, TransferError)
    assert decode.events.of(A) == ["aborted"]


# The end


def test_closing_answers_waiting_commits_and_refuses_what_comes_later(decode: DecodeSide) -> None:
    ticket = opened(decode, (1, 0, [5]))
    answers = commit(decode, ticket, 2)
    decode.receiver.close()
    decode.receiver.close()
    assert len(answers) == 1
    assert isinstance(answers[0], UnavailableError)
    payload = payload_of(1)
    assert isinstance(write(decode, frame_of(ticket, 0, 1, 0, 0, payload), payload), UnavailableError)
    with pytest.raises(UnavailableError):
        decode.receiver.open(open_request(ticket))
    np.testing.assert_array_equal(decode.pages, decode.before)
