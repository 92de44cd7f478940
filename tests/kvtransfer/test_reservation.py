"""The accounting of one reservation, against a model that holds plain sets of pages for each sender."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import StaleAttemptError, TransferError
from kvtransfer.frame import Frame
from kvtransfer.pages import HeadRange
from kvtransfer.reservation import Origin, Reservation, Share, Span, State
from tests.kvtransfer.sides import ref

HEAD_BYTES = 16
# Those of the second of three ranks, say.
HEADS = HeadRange(4, 4)
NUM_SLOTS = {0: 2, 1: 3}
RANKS = [Origin("prefill-0", 1, rank) for rank in range(4)]


@dataclasses.dataclass(frozen=True)
class Piece:
    seq: int
    group: int
    slot: int
    first_block: int
    num_blocks: int

    def frame(self, heads: HeadRange = HEADS) -> Frame:
        return Frame(
            reservation=1,
            attempt=0,
            seq=self.seq,
            group=self.group,
            slot=self.slot,
            first_head=heads.first,
            num_heads=heads.count,
            first_block=self.first_block,
            num_blocks=self.num_blocks,
            payload_bytes=self.num_blocks * heads.count * HEAD_BYTES,
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


@st.composite
def divisions(draw: st.DrawFn) -> list[HeadRange]:
    """What each sender sends: one has all heads, or up to four some each."""
    cuts = sorted({HEADS.first, *draw(st.sets(st.integers(HEADS.first + 1, HEADS.stop - 1))), HEADS.stop})
    return [HeadRange(first, stop - first) for first, stop in itertools.pairwise(cuts)]


pieces = st.builds(
    Piece, st.integers(0, 30), st.integers(0, 2), st.integers(0, 3), st.integers(0, 8), st.integers(0, 4)
)
# A sender, what it sends, and whether with another's heads.
sent_pieces = st.tuples(st.integers(0, 3), pieces, st.sampled_from([False, False, False, True]))


@settings(max_examples=150)
@given(span_bounds(), divisions(), st.lists(sent_pieces, max_size=30), st.data())
def test_pages_are_claimed_once_by_each_sender_and_commits_need_them_all(
    bounds: list[tuple[int, int, int]],
    shares: list[HeadRange],
    sent: list[tuple[int, Piece, bool]],
    data: st.DataObject,
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
    missing = [set().union(*wanted) for _ in shares]
    # Beside the wild frames, those that fill what is wanted, so that commits happen.
    filling = [
        (sender, Piece(100 + index, group, slot, first, stop - first), False)
        for sender in range(len(shares))
        for index, (group, slot, first, stop) in enumerate(
            (group, slot, first, stop) for group, first, stop in bounds for slot in range(NUM_SLOTS[group])
        )
    ]
    reservation = Reservation(ref("a"), 1, spans, HEADS, HEAD_BYTES)
    for rank, heads in zip(RANKS, shares, strict=False):
        reservation.open(rank, heads)
    seqs: list[set[int]] = [set() for _ in shares]
    for sender, piece, with_wrong_heads in data.draw(st.permutations(sent + filling)):
        if sender >= len(shares):
            with pytest.raises(StaleAttemptError):
                reservation.claim(piece.frame(), RANKS[sender])
            continue
        heads = shares[sender - 1] if with_wrong_heads else shares[sender]
        right = (
            piece.num_blocks > 0
            and piece.seq not in seqs[sender]
            and piece.pages() <= missing[sender]
            and any(piece.pages() <= row for row in wanted)
            and heads == shares[sender]
        )
        try:
            block_ids = reservation.claim(piece.frame(heads), RANKS[sender])
        except TransferError:
            assert not right
            continue
        assert right
        assert block_ids.tolist() == [100 * (piece.group + 1) + ordinal for _, _, ordinal in sorted(piece.pages())]
        seqs[sender].add(piece.seq)
        missing[sender] -= piece.pages()
        reservation.settle(piece.frame(heads), RANKS[sender], None)
    assert reservation.writers == 0

    for sender in data.draw(st.permutations(range(len(shares)))):
        assert not reservation.is_over
        num_frames = data.draw(st.sampled_from([len(seqs[sender])] * 4 + [len(seqs[sender]) + 1]))
        reservation.commit(RANKS[sender], num_frames, [])
        if num_frames != len(seqs[sender]) or missing[sender]:
            assert reservation.state is State.ABORTED
            return
    assert reservation.state is State.COMMITTED


def make() -> Reservation:
    return Reservation(ref("a"), 1, [Span(0, 0, np.array([5, 6]), 1)], HEADS, HEAD_BYTES)


WHOLE = Piece(0, 0, 0, 0, 2)
LOWER, UPPER = HeadRange(4, 2), HeadRange(6, 2)


def test_senders_of_one_worker_may_send_different_heads() -> None:
    reservation = make()
    reservation.open(RANKS[1], UPPER)
    reservation.open(RANKS[0], LOWER)
    for rank, heads in ((RANKS[0], LOWER), (RANKS[1], UPPER)):
        assert not reservation.is_over
        frame = WHOLE.frame(heads)
        assert reservation.claim(frame, rank).tolist() == [5, 6]
        reservation.settle(frame, rank, None)
        reservation.commit(rank, 1, [])
    assert reservation.state is State.COMMITTED


@pytest.mark.parametrize(
    ("origin", "heads"),
    [
        (Origin("prefill-1", 1, 1), UPPER),
        (Origin("prefill-0", 2, 1), UPPER),
        (RANKS[1], HEADS),
        (RANKS[1], HeadRange(5, 2)),
        (RANKS[1], LOWER),
        (RANKS[0], UPPER),
    ],
)
def test_another_worker_and_heads_that_somebody_sends_are_not_let_in(origin: Origin, heads: HeadRange) -> None:
    reservation = make()
    reservation.open(RANKS[0], LOWER)
    with pytest.raises(StaleAttemptError, match="open for prefill-0, rank 0"):
        reservation.open(origin, heads)
    reservation.open(RANKS[0], LOWER)
    reservation.open(RANKS[1], UPPER)


@pytest.mark.parametrize("heads", [HeadRange(3, 2), HeadRange(6, 3), HeadRange(0, 4), HeadRange(5, 0)], ids=str)
def test_heads_that_the_pool_does_not_hold_are_not_let_in(heads: HeadRange) -> None:
    reservation = make()
    with pytest.raises(TransferError, match=r"of a pool of heads \[4, 8\)"):
        reservation.open(RANKS[0], heads)
    assert reservation.state is State.RESERVED


def test_a_sender_that_has_committed_sends_nothing_more() -> None:
    reservation = make()
    reservation.open(RANKS[0], LOWER)
    frame = WHOLE.frame(LOWER)
    reservation.claim(frame, RANKS[0])
    reservation.settle(frame, RANKS[0], None)
    reservation.commit(RANKS[0], 1, [])
    for late in (lambda: reservation.claim(frame, RANKS[0]), lambda: reservation.commit(RANKS[0], 1, [])):
        with pytest.raises(StaleAttemptError):
            late()
    with pytest.raises(StaleAttemptError):
        reservation.open(RANKS[0], LOWER)
    assert (reservation.state, reservation.failure) == (State.OPEN, None)


def test_one_sender_that_fails_fails_the_others() -> None:
    reservation = make()
    reservation.open(RANKS[0], LOWER)
    reservation.open(RANKS[1], UPPER)
    frame = WHOLE.frame(LOWER)
    reservation.claim(frame, RANKS[0])
    reservation.settle(frame, RANKS[0], None)
    reservation.commit(RANKS[1], 1, [])
    assert reservation.state is State.ABORTED
    with pytest.raises(TransferError, match="2 pages are missing"):
        reservation.commit(RANKS[0], 1, [])


def test_without_pages_every_sender_commits_all_the_same() -> None:
    reservation = Reservation(ref("a"), 1, [], HEADS, HEAD_BYTES)
    reservation.open(RANKS[0], LOWER)
    reservation.open(RANKS[1], UPPER)
    reservation.commit(RANKS[0], 0, [])
    assert not reservation.is_over
    reservation.commit(RANKS[1], 0, [])
    assert reservation.state is State.COMMITTED


def test_a_claim_that_is_not_settled_fails_the_commit() -> None:
    reservation = make()
    reservation.open(RANKS[0], HEADS)
    reservation.claim(WHOLE.frame(), RANKS[0])
    reservation.commit(RANKS[0], 1, [])
    assert (reservation.state, reservation.writers) == (State.ABORTED, 1)
    reservation.settle(WHOLE.frame(), RANKS[0], None)
    assert (reservation.state, reservation.writers) == (State.ABORTED, 0)


def test_the_first_failure_stands() -> None:
    reservation = make()
    reservation.open(RANKS[0], HEADS)
    reservation.claim(WHOLE.frame(), RANKS[0])
    reservation.fail(TransferError("first"))
    reservation.settle(WHOLE.frame(), RANKS[0], TransferError("second"))
    assert isinstance(reservation.failure, TransferError)
    assert reservation.failure.message == "first"


def test_nothing_is_claimed_once_it_is_over() -> None:
    for end in (
        lambda r: r.fail(TransferError("aborted")),
        lambda r: setattr(r, "fenced", True),
        lambda r: setattr(r, "state", State.COMMITTED),
    ):
        reservation = make()
        reservation.open(RANKS[0], HEADS)
        end(reservation)
        with pytest.raises(StaleAttemptError):
            reservation.claim(WHOLE.frame(), RANKS[0])
        assert reservation.writers == 0


def test_a_share_holds_no_more_than_its_pages() -> None:
    spans = [Span(0, 0, np.array([5, 6]), 3), Span(1, 4, np.array([7]), 2)]
    assert Share(UPPER, HEAD_BYTES, spans).num_missing_pages == 2 * 3 + 1 * 2
