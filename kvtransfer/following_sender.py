"""A follower's part in the pushes of its prefill worker: it does what the leader says, and sends what it computes."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence

from baton.errors import BatonError
from baton.internal.v1 import transfer_pb2
from kvtransfer.push import Push
from kvtransfer.ranks import RankSenderEvents
from kvtransfer.sender import Sender


class FollowingSender:
    """A `SendingRank`. Called by the thread that runs the follower's steps.

    Args:
        sender: of this rank; closed by whoever made it.
    """

    def __init__(self, sender: Sender, events: RankSenderEvents) -> None:
        self._sender = sender
        self._events = events
        # Those that have not ended. The leader may not have heard yet of others.
        self._lock = threading.Lock()
        self._pushes: dict[int, Push] = {}
        self._newest = 0

    def open(self, push: int, ticket: transfer_pb2.Ticket) -> None:
        """See `SendingRank`."""
        assert push > self._newest, "pushes come in the order of their numbers"
        self._newest = push
        try:
            # Nothing takes a push out of the table before it is in.
            with self._lock:
                self._pushes[push] = self._sender.open(ticket, functools.partial(self._ended, push))
        except BatonError as error:
            self._events.ended(push, error, 0, 0.0)

    def warm(self, ticket: transfer_pb2.Ticket) -> None:
        """See `SendingRank`."""
        self._sender.warm(ticket)

    def send(self, push: int, group: int, slot: int, first_block: int, block_ids: Sequence[int]) -> None:
        """Sends pages of this rank, as `Push.send`; called from within the step that computes them."""
        if (found := self._find(push)) is not None:
            found.send(group, slot, first_block, block_ids)

    def commit(self, push: int, first_tokens: Sequence[transfer_pb2.FirstToken]) -> None:
        """See `SendingRank`."""
        if (found := self._find(push)) is not None:
            found.commit(first_tokens)

    def abort(self, push: int, reason: str) -> None:
        """See `SendingRank`."""
        if (found := self._find(push)) is not None:
            found.abort(reason)

    def _find(self, push: int) -> Push | None:
        assert push <= self._newest, "a push is opened first"
        with self._lock:
            return self._pushes.get(push)

    def _ended(self, number: int, push: Push, error: BatonError | None) -> None:
        with self._lock:
            del self._pushes[number]
        self._events.ended(number, error, push.bytes_sent, push.sending_s)
