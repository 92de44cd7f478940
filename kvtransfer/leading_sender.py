"""A prefill worker's senders as its leader's loop sees them: one push for each ticket, whatever the number of ranks.

The engine loop calls; `on_done` comes from the thread of whichever rank is the last to end.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import TypeAlias

from baton.errors import BatonError
from baton.internal.v1 import transfer_pb2
from kvtransfer.push import Push
from kvtransfer.ranks import SendingRank
from kvtransfer.sender import Sender

OnDone: TypeAlias = "Callable[[LeadingPush, BatonError | None], None]"


class LeadingSender:
    """Hears its followers' events, as `RankSenderEvents`.

    Args:
        sender: of the leader's own rank; closed with this.
    """

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self._followers: Sequence[SendingRank] = ()
        self._numbers = itertools.count(1)
        # Guards the pushes that followers have a part in.
        self._lock = threading.Lock()
        self._pushes: dict[int, LeadingPush] = {}

    def lead(self, followers: Sequence[SendingRank]) -> None:
        """Needed before the first `open`, where the worker has other ranks."""
        self._followers = followers

    def open(self, ticket: transfer_pb2.Ticket, on_done: OnDone) -> LeadingPush:
        """Begins a push of all ranks; see `Sender.open`.

        Args:
            on_done: called exactly once, when no rank reads its pool for this push any more: with None when the
                receiver has all, else with the first thing that went wrong in any rank. It must return soon and must
                not close the sender.

        Raises what `Sender.open` does, and `on_done` is not called then.
        """
        push = LeadingPush(next(self._numbers), self._followers, functools.partial(self._done, on_done))
        push.begin(self._sender, ticket)
        if self._followers:
            with self._lock:
                self._pushes[push.number] = push
            push.begin_followers(ticket)
        return push

    def warm(self, ticket: transfer_pb2.Ticket) -> None:
        """Connects to the ticket's receiver, if it is new, so that `open` finds links. Never blocks or raises."""
        self._sender.warm(ticket)
        for follower in self._followers:
            follower.warm(ticket)

    def close(self) -> None:
        """Ends the leader's part of all pushes with UnavailableError. Idempotent."""
        self._sender.close()

    # RankSenderEvents

    def ended(self, push: int, error: BatonError | None, bytes_sent: int, sending_s: float) -> None:
        with self._lock:
            found = self._pushes[push]
        found.rank_ended(error, bytes_sent, sending_s)

    def _done(self, on_done: OnDone, push: LeadingPush, error: BatonError | None) -> None:
        with self._lock:
            self._pushes.pop(push.number, None)
        on_done(push, error)


class LeadingPush:
    """Made by `LeadingSender.open`.

    Attributes:
        number: names the push to the followers.
        transport: that carries the bytes of the leader's rank; empty until there is a connection.
        bytes_sent: payload bytes that all ranks have sent; 0 before the end.
        sending_s: seconds from the first frame to the end, of the rank that took longest; 0 before.
    """

    def __init__(self, number: int, followers: Sequence[SendingRank], on_done: OnDone) -> None:
        self.number = number
        self.transport = ""
        self.bytes_sent = 0
        self.sending_s = 0.0
        self._followers = followers
        self._on_done = on_done
        self._own: Push
        # Guards all that follows, and what is known at the end.
        self._lock = threading.Lock()
        self._num_running = 1 + len(followers)
        self._error: BatonError | None = None
        self._followers_know = False

    def begin(self, sender: Sender, ticket: transfer_pb2.Ticket) -> None:
        """Opens the leader's part; raises what `Sender.open` does."""
        self._own = sender.open(ticket, self._own_ended)

    def begin_followers(self, ticket: transfer_pb2.Ticket) -> None:
        for follower in self._followers:
            follower.open(self.number, ticket)
        with self._lock:
            self._followers_know = True
            error = self._error
        if error is not None:
            self._abort_rest(error)

    def send(self, group: int, slot: int, first_block: int, block_ids: Sequence[int]) -> None:
        """Sends pages of the leader's rank, as `Push.send`; the followers send theirs."""
        self._own.send(group, slot, first_block, block_ids)

    def commit(self, first_tokens: Sequence[transfer_pb2.FirstToken]) -> None:
        """Says that all pages were sent, in this rank and by the steps that followers were told of."""
        self._own.commit(first_tokens)
        for follower in self._followers:
            follower.commit(self.number, first_tokens)

    def abort(self, reason: str) -> None:
        """Gives up in all ranks; see `Push.abort`."""
        self._own.abort(reason)
        for follower in self._followers:
            follower.abort(self.number, reason)

    def rank_ended(self, error: BatonError | None, bytes_sent: int, sending_s: float) -> None:
        """A rank reads its pool no more. The first error fails the push, and with it the other ranks' parts."""
        with self._lock:
            self.bytes_sent += bytes_sent
            self.sending_s = max(self.sending_s, sending_s)
            self._num_running -= 1
            is_done = self._num_running == 0
            is_first_error = error is not None and self._error is None
            self._error = self._error or error
            aborts = is_first_error and self._followers_know
        if is_done:
            self._on_done(self, self._error)
        elif aborts and error is not None:
            self._abort_rest(error)

    def _own_ended(self, push: Push, error: BatonError | None) -> None:
        self.transport = push.transport
        self.rank_ended(error, push.bytes_sent, push.sending_s)

    def _abort_rest(self, error: BatonError) -> None:
        self.abort(f"another rank's part failed: {error.message}")
