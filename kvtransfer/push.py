"""One ticket's way out of one rank's pool, as whoever computes the pages holds it.

The engine loop calls `send`, `commit` and `abort`; none of them blocks. The rest belongs to the links' threads. A push
has a share for each rank of the receiver that holds some of this rank's heads: one, unless the receiver's degree is the
higher.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from baton import wire
from baton.errors import BatonError, TransferError
from baton.internal.v1 import transfer_pb2
from kvtransfer.frame import Frame
from kvtransfer.pages import HeadRange
from kvtransfer.ticket import overlaps

if TYPE_CHECKING:
    from kvtransfer.link import Link

OnDone: TypeAlias = "Callable[[Push, BatonError | None], None]"


class Push:
    """Made by `Sender.open`.

    Args:
        ways: the link to each receiving rank, and what it is sent.

    Attributes:
        ref: the attempt that the blocks belong to.
    """

    def __init__(self, ticket: transfer_pb2.Ticket, ways: Iterable[tuple[Link, HeadRange]], on_done: OnDone) -> None:
        self.ref = wire.ref_from_wire(ticket.ref)
        self.ticket = ticket
        self.shares = [PushShare(self, link, heads) for link, heads in ways]
        self._on_done = on_done
        self._committing = False
        # Guards how many shares have begun and not ended, and the first error.
        self._lock = threading.Lock()
        self._num_running = 0
        self._error: BatonError | None = None

    @property
    def transport(self) -> str:
        """The transport that carries the bytes, to the first rank; empty until there is a connection."""
        return self.shares[0].link.transport

    @property
    def bytes_sent(self) -> int:
        """Payload bytes that have left."""
        return sum(share.bytes_sent for share in self.shares)

    @property
    def num_frames(self) -> int:
        """Frames that have left."""
        return sum(share.num_frames for share in self.shares)

    @property
    def transfer_s(self) -> float:
        """Seconds from `Sender.open` to the end; 0 before."""
        return max(share.transfer_s for share in self.shares)

    @property
    def sending_s(self) -> float:
        """The part of `transfer_s` since the first frame left; 0 without frames."""
        return max(share.sending_s for share in self.shares)

    def start(self) -> None:
        """Lets the links open the shares; called once.

        Raises (nothing has begun then):
            DuplicateRequestError: the ticket's reservation has a push.
            UnavailableError: the first link has failed.
        """
        # A share that ends at once waits until all are under way.
        with self._lock:
            first, *others = self.shares
            first.link.add(first)
            self._num_running = 1
            for share in others:
                try:
                    share.link.add(share)
                except BatonError as error:
                    # The first link's thread tells it, and that ends those in between.
                    first.link.end(first, error)
                    break
                self._num_running += 1

    def send(self, group: int, slot: int, first_block: int, block_ids: Sequence[int]) -> None:
        """Sends one slot's pages of logical blocks from `first_block` on; what the ticket does not ask for is dropped.

        Only references are queued: the pages must stay as they are until `on_done`.

        Args:
            block_ids: the sender's pool blocks; block_ids[i] holds logical block first_block + i of the group.
        """
        assert not self._committing, "pages were sent after commit"
        for start, stop in overlaps(self.ticket.ranges, group, first_block, len(block_ids)):
            wanted = np.asarray(block_ids[start - first_block : stop - first_block], dtype=np.int64)
            for share in self.shares:
                share.link.send(share, group, slot, start, wanted)

    def commit(self, first_tokens: Sequence[transfer_pb2.FirstToken]) -> None:
        """Says that all pages were sent; `on_done` tells whether they have arrived."""
        assert not self._committing, "commit is called once"
        self._committing = True
        for share in self.shares:
            share.link.commit(share, list(first_tokens))

    def abort(self, reason: str) -> None:
        """Gives up: `on_done` gets a TransferError soon, unless the push has ended. Idempotent.

        Beside a Commit that is under way the receiver may have committed all the same.
        """
        for share in self.shares:
            share.abort(reason)

    def share_ended(self, error: BatonError | None) -> None:
        """A link's thread reads the pool for one of the shares no more; called by that thread.

        The first error fails the push, and with it the other shares.
        """
        with self._lock:
            self._num_running -= 1
            is_first_error = error is not None and self._error is None
            if is_first_error:
                self._error = error
            is_done = self._num_running == 0
        if is_done:
            self._on_done(self, self._error)
        elif is_first_error:
            assert error is not None
            self.abort(f"another rank's part failed: {error.message}")


class PushShare:
    """What of a push goes to one rank of the receiver: the same heads of every page. Counted by the link's thread.

    Attributes:
        reservation, attempt: for frames.
        aborted: whether it was given up on this side.
        bytes_sent, num_frames, transfer_s, sending_s: as a push has them.
    """

    def __init__(self, push: Push, link: Link, heads: HeadRange) -> None:
        self.push = push
        self.link = link
        self.heads = heads
        self.reservation = push.ticket.reservation
        self.attempt = push.ref.attempt
        self.aborted = False
        self.bytes_sent = 0
        self.num_frames = 0
        self.transfer_s = 0.0
        self.sending_s = 0.0
        self._opened_s = time.monotonic()
        self._first_frame_s = 0.0

    def abort(self, reason: str) -> None:
        self.aborted = True
        self.link.end(self, TransferError(f"aborted: {reason}"))

    def count(self, frame: Frame) -> None:
        """A frame has left."""
        if not self.num_frames:
            self._first_frame_s = time.monotonic()
        self.num_frames += 1
        self.bytes_sent += frame.payload_bytes

    def finish(self) -> None:
        """Stops the clocks."""
        now_s = time.monotonic()
        self.transfer_s = now_s - self._opened_s
        if self.num_frames:
            self.sending_s = now_s - self._first_frame_s
