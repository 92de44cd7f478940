"""What the leader of a tensor-parallel worker and the transfers of its ranks say to each other.

Each rank holds some of the KV heads in a pool of its own and moves them itself: a `Receiver` in each rank of a decode
worker, a `Sender` in each rank of a prefill worker. Block ids are the same in all ranks of a worker. What is decided is
decided by the leader, whose loop sees one receiver (`LeadingReceiver`) or one sender (`LeadingSender`); it tells the
ranks by the calls below, and they tell it by the events. Over a channel to a follower each is one message: the
arguments are plain values, and nothing waits for an answer.

The engine's thread calls; `abort` may come from any. A follower takes its leader's calls in line with the steps that
the leader has it do, on the thread that does them. For blocks that are reserved may still be touched by the steps
before, for those who had them; and pages are sent from within a rank's own forward pass, by that rank alone
(`FollowingSender.send` beside the leader's `LeadingPush.send`), so that a Commit comes after them. When a follower or
its channel is gone, so is the worker: the leader's actor ends, and nothing is told of the single reservation or push.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

from baton.errors import BatonError
from baton.internal.v1 import transfer_pb2
from baton.requests import AttemptRef

# (group, first_block, block_ids): block_ids[i] receives logical block first_block + i of the group.
LackingBlocks: TypeAlias = Sequence[tuple[int, int, Sequence[int]]]


class ReceivingRank(Protocol):
    """One rank's pool, as the decode worker's leader sees it; `Receiver` is one, for the leader's own rank as well.

    Attributes:
        shard: where this rank receives which heads; known before the worker's first reservation.
    """

    @property
    def shard(self) -> transfer_pb2.Shard: ...

    def reserve(self, reservation: int, ref: AttemptRef, blocks: LackingBlocks) -> None:
        """Waits for `blocks` from now on.

        Args:
            reservation: made by the leader; each is larger than the one before, in every rank.
            blocks: may be empty: then senders only commit.
        """

    def release(self, reservation: int) -> None:
        """Lets no writer in any more; `RankReceiverEvents.released` follows once none is left. Idempotent."""

    def abort(self, request: transfer_pb2.AbortRequest) -> None:
        """Ends a transfer that is not committed; `aborted` follows, unless it is over. Idempotent."""


class RankReceiverEvents(Protocol):
    """What each rank tells of each reservation, from any of its threads; must return soon.

    At most one of `committed` and `aborted`, and `released` exactly once, after it. None begins after `released`, or
    before the one before it has returned.
    """

    def committed(self, reservation: int, first_tokens: Sequence[transfer_pb2.FirstToken]) -> None:
        """Every head of this rank in every page is in its pool and verified."""

    def aborted(self, reservation: int, reason: str) -> None:
        """A sender gave up, or what it sent was wrong. The blocks stay reserved until `ReceivingRank.release`."""

    def released(self, reservation: int) -> None:
        """Nobody writes into this rank's blocks any more."""


class SendingRank(Protocol):
    """A follower's sender, as the prefill worker's leader sees it; in the follower `FollowingSender` is one."""

    def open(self, push: int, ticket: transfer_pb2.Ticket) -> None:
        """Begins this rank's part of a push; `RankSenderEvents.ended` follows, whatever becomes of it.

        Args:
            push: names it; made by the leader, each is larger than the one before.
        """

    def warm(self, ticket: transfer_pb2.Ticket) -> None:
        """Connects to the receiving ranks that this rank will send to."""

    def commit(self, push: int, first_tokens: Sequence[transfer_pb2.FirstToken]) -> None:
        """All pages of the push were sent by the steps before. Nothing for a push that has ended."""

    def abort(self, push: int, reason: str) -> None:
        """Gives up a push. Idempotent, and nothing for one that has ended."""


class RankSenderEvents(Protocol):
    """What each follower tells, from any of its threads; must return soon."""

    def ended(self, push: int, error: BatonError | None, bytes_sent: int, sending_s: float) -> None:
        """No thread of this rank reads the pool for the push any more; told exactly once for each `open`.

        Args:
            error: what went wrong; None when the receiving ranks have all that this rank sends them.
            bytes_sent, sending_s: what this rank sent, and for how long.
        """
