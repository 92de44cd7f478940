"""One reservation of a receiver: which blocks, what has arrived, who writes, how it ended.

Pure accounting without a lock or a thread: `Receiver` calls everything here under its own lock.

    RESERVED --open--> OPEN --commit--> COMMITTED
        \\________________\\___abort___> ABORTED

`fenced` stands beside the state: once released, no writer is let in, whatever the state, and the blocks go back when
the last writer has left.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from baton.errors import BatonError, StaleAttemptError, TransferError
from baton.internal.v1 import transfer_pb2
from baton.requests import AttemptRef
from kvtransfer.frame import Frame
from kvtransfer.pages import BlockIds

Answer: TypeAlias = Callable[[BatonError | None], None]


class Origin(NamedTuple):
    """One incarnation of a sender."""

    sender: str
    epoch: int


class State(enum.Enum):
    RESERVED = "reserved"
    OPEN = "open"
    COMMITTED = "committed"
    ABORTED = "aborted"


@dataclasses.dataclass(frozen=True, slots=True)
class Commit:
    """A Commit that waits for its frames."""

    num_frames: int
    first_tokens: list[transfer_pb2.FirstToken]
    answer: Answer


class Span:
    """Consecutive logical blocks of one group, and which of their pages are claimed.

    Args:
        num_slots: pages in one block of the group.
        block_ids: int64 [num_blocks], the pool's block for each ordinal from `first_block`.
    """

    def __init__(self, group: int, first_block: int, block_ids: BlockIds, num_slots: int) -> None:
        self.group = group
        self.first_block = first_block
        self.block_ids = block_ids
        self.claimed: npt.NDArray[np.bool_] = np.zeros((num_slots, len(block_ids)), dtype=np.bool_)

    def holds(self, frame: Frame) -> bool:
        offset = frame.first_block - self.first_block
        return (
            frame.group == self.group
            and frame.slot < len(self.claimed)
            and 0 <= offset <= offset + frame.num_blocks <= len(self.block_ids)
        )

    def claim(self, frame: Frame) -> BlockIds:
        """The pool's blocks of a frame that `holds` accepted; each page can be claimed once."""
        start = frame.first_block - self.first_block
        blocks = slice(start, start + frame.num_blocks)
        claimed = self.claimed[frame.slot, blocks]
        if np.count_nonzero(claimed):
            raise TransferError(f"frame {frame.seq} sends pages that another frame has sent")
        claimed[:] = True
        return self.block_ids[blocks]


class Reservation:
    """Blocks that wait for one push.

    Args:
        reservation_id: names the reservation in frames.
        page_bytes: bytes of one page of the pool.
    """

    def __init__(self, ref: AttemptRef, reservation_id: int, spans: Sequence[Span], page_bytes: int) -> None:
        self.ref = ref
        self.reservation_id = reservation_id
        self.state = State.RESERVED
        self.fenced = False
        # Threads that copy in, or that tell the worker about this reservation.
        self.writers = 0
        self.opened_by: Origin | None = None
        self.commit: Commit | None = None
        self.failure: BatonError | None = None
        # The state's end has been told to the worker; the release has been.
        self.announced = False
        self.returned = False
        self._spans = spans
        self._page_bytes = page_bytes
        self._seqs: set[int] = set()
        self.num_verified_frames = 0
        self.num_missing_pages = sum(span.claimed.size for span in spans)

    @property
    def is_over(self) -> bool:
        """Whether no frame is let in any more."""
        return self.fenced or self.state in (State.COMMITTED, State.ABORTED)

    def open(self, origin: Origin) -> None:
        """Lets one sender in; the same one may ask again until its first frame has arrived."""
        if self.is_over:
            raise StaleAttemptError(f"reservation {self.reservation_id} is over ({self.state.value})")
        if self.opened_by is not None and (self.opened_by != origin or self._seqs):
            raise StaleAttemptError(f"reservation {self.reservation_id} is open for {self.opened_by.sender}")
        self.opened_by = origin
        self.state = State.OPEN

    def claim(self, frame: Frame, origin: Origin) -> BlockIds:
        """Pins the reservation and returns the pool's blocks to write: int64 [num_blocks].

        Raises:
            StaleAttemptError: the frame is not (or no longer) wanted; the reservation is unharmed.
            TransferError: the frame is wanted but wrong.
        """
        if self.is_over or self.ref.attempt != frame.attempt or self.opened_by != origin:
            raise StaleAttemptError(
                f"frame {frame.seq} of attempt {frame.attempt} from {origin.sender} came to a reservation that is "
                f"{'released' if self.fenced else self.state.value} for attempt {self.ref.attempt}"
            )
        if frame.seq in self._seqs:
            raise TransferError(f"frame {frame.seq} came twice")
        span = next((span for span in self._spans if span.holds(frame)), None)
        if span is None or frame.num_blocks == 0:
            raise TransferError(
                f"frame {frame.seq} sends {frame.num_blocks} blocks from {frame.first_block} of group {frame.group}, "
                f"slot {frame.slot}, which were not asked for"
            )
        if frame.payload_bytes != frame.num_blocks * self._page_bytes:
            raise TransferError(f"frame {frame.seq} has {frame.payload_bytes} bytes for {frame.num_blocks} pages")
        block_ids = span.claim(frame)
        self._seqs.add(frame.seq)
        self.writers += 1
        return block_ids

    def settle(self, frame: Frame, *, verified: bool) -> None:
        """Ends what `claim` began."""
        self.writers -= 1
        if verified:
            self.num_verified_frames += 1
            self.num_missing_pages -= frame.num_blocks
        else:
            self.fail(TransferError(f"frame {frame.seq} is corrupt: its checksum is not that of the bytes in the pool"))

    def fail(self, error: BatonError) -> None:
        """Ends the transfer, unless it has ended; the blocks stay reserved."""
        if not self.is_over:
            self.state = State.ABORTED
            # A traceback would keep the payload alive, and with it the sender's ring.
            self.failure = error.with_traceback(None)

    def judge(self) -> None:
        """Commits if all has arrived that the sender and the ticket name; fails if it never can."""
        if self.commit is None or self.state is not State.OPEN or self.fenced:
            return
        missing_frames = self.commit.num_frames - self.num_verified_frames
        if missing_frames == 0 and self.num_missing_pages == 0:
            self.state = State.COMMITTED
        elif missing_frames < 0 or (missing_frames == 0 and self.num_missing_pages):
            self.fail(
                TransferError(
                    f"committed {self.commit.num_frames} frames; {self.num_verified_frames} arrived and "
                    f"{self.num_missing_pages} pages are missing"
                )
            )
