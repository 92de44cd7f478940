"""One ticket's way to its receiver, as the prefill worker's engine loop holds it.

The engine loop calls `send`, `commit` and `abort`; none of them blocks. The rest belongs to the link's thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from baton import wire
from baton.errors import BatonError, TransferError
from baton.internal.v1 import transfer_pb2
from kvtransfer.frame import Frame
from kvtransfer.ticket import overlaps

if TYPE_CHECKING:
    from kvtransfer.link import Link

OnDone: TypeAlias = "Callable[[Push, BatonError | None], None]"


class Push:
    """Made by `Sender.open`.

    Attributes:
        ref: the attempt that the blocks belong to.
        bytes_sent: payload bytes that have left.
        num_frames: frames that have left.
        aborted: whether `abort` was called.
        transfer_s: seconds from `Sender.open` to the end; 0 before.
        sending_s: the part of it since the first frame left; 0 without frames.
    """

    def __init__(self, ticket: transfer_pb2.Ticket, link: Link, on_done: OnDone) -> None:
        self.ref = wire.ref_from_wire(ticket.ref)
        self.ticket = ticket
        self.bytes_sent = 0
        self.num_frames = 0
        self.transfer_s = 0.0
        self.sending_s = 0.0
        self.aborted = False
        self.on_done = on_done
        self._link = link
        self._committing = False
        self._opened_s = time.monotonic()
        self._first_frame_s = 0.0

    @property
    def transport(self) -> str:
        """The transport that carries the bytes; empty until there is a connection."""
        return self._link.transport

    def send(self, group: int, slot: int, first_block: int, block_ids: Sequence[int]) -> None:
        """Sends one slot's pages of logical blocks from `first_block` on; what the ticket does not ask for is dropped.

        Only references are queued: the pages must stay as they are until `on_done`.

        Args:
            block_ids: the sender's pool blocks; block_ids[i] holds logical block first_block + i of the group.
        """
        assert not self._committing, "pages were sent after commit"
        for start, stop in overlaps(self.ticket.ranges, group, first_block, len(block_ids)):
            wanted = np.asarray(block_ids[start - first_block : stop - first_block], dtype=np.int64)
            self._link.send(self, group, slot, start, wanted)

    def commit(self, first_tokens: Sequence[transfer_pb2.FirstToken]) -> None:
        """Says that all pages were sent; `on_done` tells whether they have arrived."""
        assert not self._committing, "commit is called once"
        self._committing = True
        self._link.commit(self, list(first_tokens))

    def abort(self, reason: str) -> None:
        """Gives up: `on_done` gets a TransferError soon, unless the push has ended. Idempotent.

        Beside a Commit that is under way the receiver may have committed all the same.
        """
        self.aborted = True
        self._link.end(self, TransferError(f"aborted: {reason}"))

    def count(self, frame: Frame) -> None:
        """A frame has left; called by the link's thread."""
        if not self.num_frames:
            self._first_frame_s = time.monotonic()
        self.num_frames += 1
        self.bytes_sent += frame.payload_bytes

    def finish(self) -> None:
        """Stops the clocks; called by the link's thread."""
        now_s = time.monotonic()
        self.transfer_s = now_s - self._opened_s
        if self.num_frames:
            self.sending_s = now_s - self._first_frame_s
