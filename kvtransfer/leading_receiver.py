"""A decode worker's receivers as its leader's loop sees them: one pool, whatever the number of ranks that share it.

The engine loop reserves and releases; the KVTransfer service aborts; the ranks' events come from threads of theirs.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Sequence
from typing import Protocol

from baton import wire
from baton.config import TransferConfig
from baton.errors import DuplicateRequestError
from baton.internal.v1 import transfer_pb2
from baton.requests import AttemptRef
from kvtransfer.ranks import LackingBlocks, ReceivingRank


class ReceiverEvents(Protocol):
    """What a worker hears of its reservations, from data plane and control threads; must return soon.

    For one reservation: at most one of `committed` and `aborted`, and `released` exactly once, after it. No call begins
    after `released`.
    """

    def committed(self, ref: AttemptRef, first_tokens: list[transfer_pb2.FirstToken]) -> None:
        """Every page is in the pools of all ranks, and verified."""

    def aborted(self, ref: AttemptRef, reason: str) -> None:
        """A sender gave up, or what it sent was wrong. The blocks stay reserved until `LeadingReceiver.release`."""

    def released(self, ref: AttemptRef) -> None:
        """Nobody writes into the blocks any more; they may be freed."""


@dataclasses.dataclass(slots=True)
class _Reservation:
    """
    Attributes:
        num_committed, num_released: ranks that have told so.
        told: the outcome has been told.
        fenced: it has been released, and no outcome will be told.
    """

    ref: AttemptRef
    num_committed: int = 0
    num_released: int = 0
    told: bool = False
    fenced: bool = False


class LeadingReceiver:
    """Hears its ranks' events, as `RankReceiverEvents`.

    Args:
        fingerprint: what a sender must agree with.
        worker, epoch: this incarnation.
    """

    def __init__(
        self,
        fingerprint: transfer_pb2.LayoutFingerprint,
        worker: str,
        epoch: int,
        config: TransferConfig,
        events: ReceiverEvents,
    ) -> None:
        self._fingerprint = fingerprint
        self._worker = worker
        self._epoch = epoch
        self._lease_ms = round(config.lease_s * 1e3)
        self._events = events
        self._ranks: Sequence[ReceivingRank] = ()
        self._control_address = ""
        # Epochs never repeat, so neither do ids, not even over incarnations behind one address.
        self._next_id = itertools.count((epoch & 0xFFFFFFFF) << 32 | 1)
        self._lock = threading.Lock()
        self._by_id: dict[int, _Reservation] = {}
        self._ids: dict[AttemptRef, int] = {}

    def lead(self, ranks: Sequence[ReceivingRank], control_address: str) -> None:
        """Needed before the first `reserve`.

        Args:
            ranks: all of the worker, in their order.
            control_address: host:port of the KVTransfer service, which calls `abort`.
        """
        self._ranks = ranks
        self._control_address = control_address

    def reserve(
        self, ref: AttemptRef, num_tokens: int, cached_tokens: int, blocks: LackingBlocks
    ) -> transfer_pb2.Ticket:
        """Waits for `blocks`, in every rank, from now on.

        Args:
            num_tokens: tokens whose KV is transferred or cached.
            cached_tokens: leading tokens that the pools have already.
            blocks: may be empty: then the sender only commits.

        Raises:
            DuplicateRequestError: `ref` has a reservation.
        """
        assert self._ranks, "lead comes before reserve"
        with self._lock:
            if ref in self._ids:
                raise DuplicateRequestError(f"{ref} has a reservation")
            reservation = self._ids[ref] = next(self._next_id)
            self._by_id[reservation] = _Reservation(ref)
        for rank in self._ranks:
            rank.reserve(reservation, ref, blocks)
        return transfer_pb2.Ticket(
            ref=wire.ref_to_wire(ref),
            reservation=reservation,
            worker=self._worker,
            epoch=self._epoch,
            control_address=self._control_address,
            num_tokens=num_tokens,
            cached_tokens=cached_tokens,
            ranges=[
                transfer_pb2.BlockRange(group=group, first_block=first_block, num_blocks=len(block_ids))
                for group, first_block, block_ids in blocks
                if block_ids
            ],
            layout=self._fingerprint,
            shards=[rank.shard for rank in self._ranks],
            lease_ms=self._lease_ms,
        )

    def release(self, ref: AttemptRef) -> None:
        """Fences a reservation in every rank; `events.released` follows once nobody writes, perhaps within this call.

        Idempotent.
        """
        with self._lock:
            reservation = self._ids.get(ref)
            if reservation is None or self._by_id[reservation].fenced:
                return
            self._by_id[reservation].fenced = True
        for rank in self._ranks:
            rank.release(reservation)

    def abort(self, request: transfer_pb2.AbortRequest) -> None:
        """Ends a transfer that is not committed. Idempotent, and nothing for a reservation that is over."""
        with self._lock:
            if self._ids.get(wire.ref_from_wire(request.ref)) != request.reservation:
                return
        for rank in self._ranks:
            rank.abort(request)

    # RankReceiverEvents. A rank tells of its release only when it has told all else, so the last of the calls below is
    # not made before the others have returned.

    def committed(self, reservation: int, first_tokens: Sequence[transfer_pb2.FirstToken]) -> None:
        with self._lock:
            found = self._by_id[reservation]
            found.num_committed += 1
            due = found.num_committed == len(self._ranks) and not (found.told or found.fenced)
            found.told |= due
        if due:
            self._events.committed(found.ref, list(first_tokens))

    def aborted(self, reservation: int, reason: str) -> None:
        with self._lock:
            found = self._by_id[reservation]
            due = not (found.told or found.fenced)
            found.told |= due
        if due:
            self._events.aborted(found.ref, reason)

    def released(self, reservation: int) -> None:
        with self._lock:
            found = self._by_id[reservation]
            found.num_released += 1
            due = found.num_released == len(self._ranks)
            if due:
                del self._by_id[reservation], self._ids[found.ref]
        if due:
            self._events.released(found.ref)
