"""The accounting of one reservation, against a model that holds plain sets of pages."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import StaleAttemptError, TransferError
from kvtransfer.frame import Frame
from kvtransfer.reservation import Commit, Origin, Reservation, Span, State
from tests.kvtransfer.sides import ref

PAGE_BYTES = 32
NUM_SLOTS = {0: 2, 1: 3}
SENDER = Origin("prefill-0", 1)


@dataclasses.dataclass(frozen=True)
class Piece:
    seq: int
    group: int
    slot: int
    first_block: int
    num_blocks: int

    def frame(self) -> Frame:
        return Frame(
            reservation=1,
            attempt=0,
            seq=self.seq,
            group=self.group,
            slot=self.slot,
            first_block=self.first_block,
            num_blocks=self.num_blocks,
            payload_bytes=self.num_blocks * PAGE_BYTES,
            checksum=0,
        )

    def pages(self) -> set[tuple[int, int, int]]:
        ordinals = range(self.first_block, self.first_block + self.num_blocks)
        return {(self.group, self.slot, ordinal) for ordinal in ordinals}


@st.composite
def span_bounds(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """Disjoint (group, first, stop), two ranges at most in a group."""
    bounds = []
    for group in NUM_SLOTS:
        cuts = sorted(draw(st.sets(st.integers(0, 8), max_size=4)))
        bounds += [(group, first, stop) for first, stop in zip(cuts[::2], cuts[1::2], strict=False)]
    return bounds


pieces = st.builds(
    Piece, st.integers(0, 30), st.integers(0, 2), st.integers(0, 3), st.integers(0, 8), st.integers(0, 4)
)


@settings(max_examples=150)
@given(span_bounds(), st.lists(pieces, max_size=30), st.data())
def test_pages_are_claimed_once_and_a_commit_needs_them_all(
    bounds: list[tuple[int, int, int]], sent: list[Piece], data: st.DataObject
) -> None:
    spans = [
        Span(group, first, np.arange(first, stop) + 100 * (group + 1), NUM_SLOTS[group])
        for group, first, stop in bounds
    ]
    wanted = [
        {(group, slot, ordinal) for ordinal in range(first, stop)}
        for group, first, stop in bounds
        for slot in range(NUM_SLOTS[group])
    ]
    missing = set().union(*wanted)
    # Beside the wild frames, those that fill what is wanted, so that commits happen.
    filling = [
        Piece(100 + index, group, slot, first, stop - first)
        for index, (group, slot, first, stop) in enumerate(
            (group, slot, first, stop) for group, first, stop in bounds for slot in range(NUM_SLOTS[group])
        )
    ]
    sent = data.draw(st.permutations(sent + filling))
    reservation = Reservation(ref("a"), 1, spans, PAGE_BYTES)
    reservation.open(SENDER)
    seqs: set[int] = set()
    for piece in sent:
        right = (
            piece.num_blocks > 0
            and piece.seq not in seqs
            and piece.pages() <= missing
            and any(piece.pages() <= row for row in wanted)
        )
        try:
            block_ids = reservation.claim(piece.frame(), SENDER)
        except TransferError:
            assert not right
            continue
        assert right
        assert block_ids.tolist() == [100 * (piece.group + 1) + ordinal for _, _, ordinal in sorted(piece.pages())]
        seqs.add(piece.seq)
        missing -= piece.pages()
        reservation.settle(piece.frame(), verified=True)
        assert reservation.num_missing_pages == len(missing)

    num_frames = data.draw(st.integers(max(0, len(seqs) - 1), len(seqs) + 1))
    reservation.commit = Commit(num_frames, [], lambda error: None)
    reservation.judge()
    if num_frames > len(seqs):
        assert reservation.state is State.OPEN
    else:
        whole = num_frames == len(seqs) and not missing
        assert reservation.state is (State.COMMITTED if whole else State.ABORTED)


def make() -> Reservation:
    return Reservation(ref("a"), 1, [Span(0, 0, np.array([5, 6]), 1)], PAGE_BYTES)


FRAME = Piece(0, 0, 0, 0, 2).frame()


def test_a_claim_that_is_not_settled_keeps_the_commit_waiting() -> None:
    reservation = make()
    reservation.open(SENDER)
    reservation.claim(FRAME, SENDER)
    reservation.commit = Commit(1, [], lambda error: None)
    reservation.judge()
    assert (reservation.state, reservation.writers) == (State.OPEN, 1)
    reservation.settle(FRAME, verified=True)
    reservation.judge()
    assert (reservation.state, reservation.writers) == (State.COMMITTED, 0)


def test_the_first_failure_stands() -> None:
    reservation = make()
    reservation.open(SENDER)
    reservation.claim(FRAME, SENDER)
    reservation.fail(TransferError("first"))
    reservation.settle(FRAME, verified=False)
    assert isinstance(reservation.failure, TransferError)
    assert reservation.failure.message == "first"


def test_nothing_is_claimed_once_it_is_over() -> None:
    for end in (
        lambda r: r.fail(TransferError("aborted")),
        lambda r: setattr(r, "fenced", True),
        lambda r: setattr(r, "state", State.COMMITTED),
    ):
        reservation = make()
        reservation.open(SENDER)
        end(reservation)
        try:
            reservation.claim(FRAME, SENDER)
        except StaleAttemptError:
            assert reservation.writers == 0
        else:
            raise AssertionError("a reservation that is over let a writer in")
