"""One reservation of a receiver: which blocks, who sends which heads, what has arrived, who writes, how it ended.

Pure accounting without a lock or a thread: `Receiver` calls everything here under its own lock.

    RESERVED --open--> OPEN --commits of all heads--> COMMITTED
        \\________________\\___________abort___________> ABORTED

The heads of the pool may come from several senders, the ranks of one worker. Each opens a share of its own, the same
heads of every page, and commits it; no two shares have a head in common, and the reservation is committed when the
shares that are hold all its heads.

`fenced` stands beside the state: once released, no writer is let in, whatever the state, and the blocks go back when
the last writer has left.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from baton.errors import BatonError, StaleAttemptError, TransferError
from baton.internal.v1 import transfer_pb2
from baton.requests import AttemptRef
from kvtransfer.device import Mark
from kvtransfer.frame import Frame
from kvtransfer.pages import BlockIds, HeadRange


class Origin(NamedTuple):
    """One rank of one incarnation of a sender."""

    sender: str
    epoch: int
    rank: int = 0


class State(enum.Enum):
    RESERVED = "reserved"
    OPEN = "open"
    COMMITTED = "committed"
    ABORTED = "aborted"


class Span:
    """Consecutive logical blocks of one group.

    Args:
        num_slots: pages in one block of the group.
        block_ids: int64 [num_blocks], the pool's block for each ordinal from `first_block`.
    """

    def __init__(self, group: int, first_block: int, block_ids: BlockIds, num_slots: int) -> None:
        self.group = group
        self.first_block = first_block
        self.block_ids = block_ids
        self.num_slots = num_slots

    def holds(self, frame: Frame) -> bool:
        offset = frame.first_block - self.first_block
        return (
            frame.group == self.group
            and frame.slot < self.num_slots
            and 0 <= offset < offset + frame.num_blocks <= len(self.block_ids)
        )


class Share:
    """What one sender sends: the same heads of every page.

    Attributes:
        num_frames: frames that have arrived and are verified.
        num_missing_pages: pages of which the heads have not.
        begun: whether a frame has been claimed.
        committed: whether the sender has sent all.
    """

    def __init__(self, heads: HeadRange, head_bytes: int, spans: Sequence[Span]) -> None:
        self.heads = heads
        self.num_frames = 0
        self.num_missing_pages = sum(span.num_slots * len(span.block_ids) for span in spans)
        self.committed = False
        self._page_bytes = heads.count * head_bytes
        self._seqs: set[int] = set()
        # bool [num_slots, num_blocks] beside each span: whether a frame has come.
        self._pages: list[tuple[Span, npt.NDArray[np.bool_]]] = [
            (span, np.zeros((span.num_slots, len(span.block_ids)), dtype=np.bool_)) for span in spans
        ]

    @property
    def begun(self) -> bool:
        return bool(self._seqs)

    def claim(self, frame: Frame) -> BlockIds:
        """The pool's blocks of a frame; each page can be claimed once. Raises TransferError if the frame is wrong."""
        if frame.seq in self._seqs:
            raise TransferError(f"frame {frame.seq} came twice")
        span, claimed = self._find(frame)
        if frame.first_head != self.heads.first or frame.num_heads != self.heads.count:
            raise TransferError(f"frame {frame.seq} has {frame.heads}, and its sender opened {self.heads}")
        if frame.payload_bytes != frame.num_blocks * self._page_bytes:
            raise TransferError(f"frame {frame.seq} has {frame.payload_bytes} bytes for {frame.num_blocks} pages")
        start = frame.first_block - span.first_block
        blocks = slice(start, start + frame.num_blocks)
        pages = claimed[frame.slot, blocks]
        if np.count_nonzero(pages):
            raise TransferError(f"frame {frame.seq} sends pages that another frame has sent")
        pages[:] = True
        self._seqs.add(frame.seq)
        return span.block_ids[blocks]

    def _find(self, frame: Frame) -> tuple[Span, npt.NDArray[np.bool_]]:
        for pages in self._pages:
            if pages[0].holds(frame):
                return pages
        raise TransferError(
            f"frame {frame.seq} sends {frame.num_blocks} blocks from {frame.first_block} of group {frame.group}, "
            f"slot {frame.slot}, which were not asked for"
        )


class Reservation:
    """Blocks that wait for the pushes of one worker's ranks.

    Args:
        reservation_id: names the reservation in frames.
        heads, head_bytes: of each page of the pool.
    """

    def __init__(
        self, ref: AttemptRef, reservation_id: int, spans: Sequence[Span], heads: HeadRange, head_bytes: int
    ) -> None:
        self.ref = ref
        self.reservation_id = reservation_id
        self.state = State.RESERVED
        self.fenced = False
        # Threads that copy in, or that tell the worker about this reservation.
        self.writers = 0
        self.first_tokens: list[transfer_pb2.FirstToken] = []
        self.failure: BatonError | None = None
        # The state's end has been told to the worker; the release has been.
        self.announced = False
        self.returned = False
        self._spans = spans
        self._heads = heads
        self._head_bytes = head_bytes
        self._shares: dict[Origin, Share] = {}
        # What the pool's owner had begun when it reserved: it may still touch the blocks for those who had them before.
        self.mark: Mark | None = None

    @property
    def is_over(self) -> bool:
        """Whether no frame is let in any more."""
        return self.fenced or self.state in (State.COMMITTED, State.ABORTED)

    def open(self, origin: Origin, heads: HeadRange) -> None:
        """Lets a sender in, with heads that no other sends; the same one may ask again until its first frame has come.

        Raises (the reservation is unharmed):
            StaleAttemptError: it is over, open for another worker, or open for some of these heads.
            TransferError: these are no heads of the pool.
        """
        if self.is_over:
            raise StaleAttemptError(f"reservation {self.reservation_id} is over ({self.state.value})")
        if not self._heads.holds(heads):
            raise TransferError(f"{origin.sender} opened {heads} of a pool of {self._heads}")
        share = self._shares.get(origin)
        if share is not None and share.heads == heads and not share.begun and not share.committed:
            return
        for other, share in self._shares.items():
            if other == origin or other[:2] != origin[:2] or share.heads.overlap(heads).count:
                raise StaleAttemptError(
                    f"reservation {self.reservation_id} is open for {other.sender}, rank {other.rank}, {share.heads}"
                )
        self._shares[origin] = Share(heads, self._head_bytes, self._spans)
        self.state = State.OPEN

    def claim(self, frame: Frame, origin: Origin) -> BlockIds:
        """Pins the reservation and returns the pool's blocks to write: int64 [num_blocks].

        Raises:
            StaleAttemptError: the frame is not (or no longer) wanted; the reservation is unharmed.
            TransferError: the frame is wanted but wrong.
        """
        share = self._shares.get(origin)
        if self.is_over or self.ref.attempt != frame.attempt or share is None or share.committed:
            raise StaleAttemptError(
                f"frame {frame.seq} of attempt {frame.attempt} from {origin.sender} came to a reservation that is "
                f"{'released' if self.fenced else self.state.value} for attempt {self.ref.attempt}"
            )
        block_ids = share.claim(frame)
        self.writers += 1
        return block_ids

    def settle(self, frame: Frame, origin: Origin, failure: BatonError | None) -> None:
        """Ends what `claim` began; `failure` is why what was written is not what was sent, if so."""
        self.writers -= 1
        if failure is None:
            share = self._shares[origin]
            share.num_frames += 1
            share.num_missing_pages -= frame.num_blocks
        else:
            self.fail(failure)

    def commit(self, origin: Origin, num_frames: int, first_tokens: Sequence[transfer_pb2.FirstToken]) -> None:
        """Takes a sender's word that it has sent all, and fails if that has not arrived.

        Raises:
            StaleAttemptError: the reservation is over, or the sender's share not open.
            BatonError: the transfer has failed before.
        """
        if self.failure is not None:
            raise self.failure
        share = self._shares.get(origin)
        if self.is_over or share is None or share.committed:
            raise StaleAttemptError(f"reservation {self.reservation_id} cannot be committed now")
        if num_frames != share.num_frames or share.num_missing_pages:
            self.fail(
                TransferError(
                    f"committed {num_frames} frames; {share.num_frames} arrived and "
                    f"{share.num_missing_pages} pages are missing"
                )
            )
            return
        share.committed = True
        # Shares have no head in common, so that their number tells whether they have all.
        if sum(share.heads.count for share in self._shares.values() if share.committed) == self._heads.count:
            self.first_tokens = list(first_tokens)
            self.state = State.COMMITTED

    def fail(self, error: BatonError) -> None:
        """Ends the transfer, unless it has ended; the blocks stay reserved."""
        if not self.is_over:
            self.state = State.ABORTED
            # A traceback would keep the payload alive, and with it the sender's ring.
            self.failure = error.with_traceback(None)
