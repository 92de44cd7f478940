"""The receiving end of KV transfers: alone writes arriving bytes into its worker's pool.

The engine loop reserves and releases; data plane threads open, write and commit; the KVTransfer service aborts.
One lock guards all reservations. It is never held while bytes are copied or a callback runs: whoever does either pins
the reservation (its writer count), and a release takes effect when the last pin has gone. So a late or dead sender can
never write into blocks that went to another request: each check-and-pin excludes every fence.
"""

from __future__ import annotations

import functools
import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from baton import wire
from baton.config import TransferConfig
from baton.errors import BatonError, DuplicateRequestError, StaleAttemptError, TransferError, UnavailableError
from baton.internal.v1 import transfer_pb2
from baton.metrics import TransferMetrics
from baton.requests import AttemptRef
from engine.kv.layout import NULL_BLOCK, KVLayout
from kvtransfer import transports
from kvtransfer.frame import Frame
from kvtransfer.pages import BlockIds, Bytes, PageMemory
from kvtransfer.reservation import Answer, Commit, Origin, Reservation, Span, State
from kvtransfer.ticket import check_layouts
from kvtransfer.transports.base import Listener, TransportUnavailableError

logger = logging.getLogger(__name__)


class ReceiverEvents(Protocol):
    """What a worker hears of its reservations, from data plane and control threads; must return soon.

    For one reservation: at most one of `committed` and `aborted`, and `released` exactly once, after it. No call begins
    after `released`.
    """

    def committed(self, ref: AttemptRef, first_tokens: list[transfer_pb2.FirstToken]) -> None:
        """Every page is in the pool and verified."""

    def aborted(self, ref: AttemptRef, reason: str) -> None:
        """The sender gave up, or what it sent was wrong. The blocks stay reserved until `Receiver.release`."""

    def released(self, ref: AttemptRef) -> None:
        """Nobody writes into the blocks any more; they may be freed."""


class Receiver:
    """Reservations of one worker's pool.

    Args:
        memory: the pool's bytes.
        fingerprint: what a sender must agree with.
        worker, epoch: this incarnation, for tickets and links.

    Attributes:
        max_payload_bytes: largest payload of one frame that is accepted.
        timeout_s: longest wait for a sender that has begun something.
    """

    def __init__(
        self,
        memory: PageMemory,
        layout: KVLayout,
        fingerprint: transfer_pb2.LayoutFingerprint,
        worker: str,
        epoch: int,
        config: TransferConfig,
        metrics: TransferMetrics,
        events: ReceiverEvents,
    ) -> None:
        if (memory.num_slots, memory.page_bytes) != (layout.num_slots, layout.page_bytes):
            raise ValueError("the pool's shape is not that of the layout")
        self.worker = worker
        self.epoch = epoch
        self._memory = memory
        self._layout = layout
        self._fingerprint = fingerprint
        self._config = config
        self._metrics = metrics
        self._events = events
        self.max_payload_bytes = max(config.frame_bytes, memory.page_bytes)
        self.timeout_s = config.timeout_s
        self._lock = threading.Lock()
        self._by_id: dict[int, Reservation] = {}
        self._by_ref: dict[AttemptRef, Reservation] = {}
        # Epochs never repeat, so neither do ids, not even over incarnations behind one address.
        self._ids = itertools.count((epoch & 0xFFFFFFFF) << 32 | 1)
        self._control_address = ""
        self._listeners: list[Listener] = []
        # Found once, since they are counted for every frame.
        self._received_bytes = {name: metrics.received_bytes.labels(name) for name in transports.TRANSPORTS}
        self._closed = False

    def listen(self, host: str, control_address: str) -> None:
        """Starts the data plane; needed before the first `reserve`.

        Args:
            host: address on which transports that need one take a free port.
            control_address: host:port of the KVTransfer service, which calls `abort`.

        Raises:
            UnavailableError: none of the configured transports can be used here.
        """
        assert not self._listeners, "listen is called once"
        self._control_address = control_address
        for name in self._config.transports:
            try:
                self._listeners.append(transports.load(name).listen(self, host))
            except TransportUnavailableError as error:
                logger.warning("no KV can come by %s: %s", name, error)
        if not self._listeners:
            raise UnavailableError(f"no KV can come by any of {', '.join(self._config.transports)}")

    def close(self) -> None:
        """Stops the data plane; pending commits fail. Idempotent."""
        for listener in self._listeners:
            listener.close()
        with self._lock:
            self._closed = True
            commits = [reservation.commit for reservation in self._by_id.values() if reservation.commit is not None]
            for reservation in self._by_id.values():
                reservation.commit = None
        for commit in commits:
            commit.answer(UnavailableError(f"{self.worker} is stopping"))

    def reserve(
        self,
        ref: AttemptRef,
        num_tokens: int,
        cached_tokens: int,
        blocks: Sequence[tuple[int, int, Sequence[int]]],
    ) -> transfer_pb2.Ticket:
        """Waits for `blocks` from now on.

        Args:
            num_tokens: tokens whose KV is transferred or cached.
            cached_tokens: leading tokens that the pool has already.
            blocks: (group, first_block, block_ids): block_ids[i] receives logical block first_block + i of the group.
                May be empty: then the sender only commits.

        Raises:
            DuplicateRequestError: `ref` has a reservation.
        """
        assert self._listeners, "listen comes before reserve"
        spans = [self._span(group, first_block, block_ids) for group, first_block, block_ids in blocks if block_ids]
        with self._lock:
            if ref in self._by_ref:
                raise DuplicateRequestError(f"{ref} has a reservation")
            reservation = Reservation(ref, next(self._ids), spans, self._memory.page_bytes)
            self._by_ref[ref] = self._by_id[reservation.reservation_id] = reservation
            self._metrics.reservations.inc()
        return transfer_pb2.Ticket(
            ref=wire.ref_to_wire(ref),
            reservation=reservation.reservation_id,
            worker=self.worker,
            epoch=self.epoch,
            control_address=self._control_address,
            num_tokens=num_tokens,
            cached_tokens=cached_tokens,
            ranges=[
                transfer_pb2.BlockRange(group=span.group, first_block=span.first_block, num_blocks=len(span.block_ids))
                for span in spans
            ],
            layout=self._fingerprint,
            offers=[listener.offer for listener in self._listeners],
            lease_ms=round(self._config.lease_s * 1e3),
        )

    def release(self, ref: AttemptRef) -> None:
        """Fences a reservation; `events.released` follows once nobody writes, perhaps within this call. Idempotent."""
        with self._lock:
            reservation = self._by_ref.get(ref)
            if reservation is None:
                return
            reservation.fenced = True
        self._advance(reservation)

    def open(self, request: transfer_pb2.OpenRequest) -> None:
        """Lets a sender in.

        Raises:
            StaleAttemptError: the reservation is over, another attempt's, or open for another sender.
            LayoutMismatchError: the pools differ.
        """
        with self._lock:
            reservation = self._find(request.reservation, request.ref)
            check_layouts(self._fingerprint, request.layout)
            reservation.open(Origin(request.sender, request.sender_epoch))

    def commit(self, request: transfer_pb2.CommitRequest, answer: Answer) -> None:
        """Asks for the end; `answer` is called exactly once, perhaps before this returns, from any thread.

        The answer is None when `num_frames` verified frames have arrived and cover all that the ticket asks for.
        How long to wait is the caller's business: `abort` makes the answer come at once.

        Raises (`answer` is not called then):
            StaleAttemptError: the reservation is over, not open, or being committed.
            TransferError: the transfer has failed before.
        """
        with self._lock:
            reservation = self._find(request.reservation, request.ref)
            if reservation.state is State.ABORTED and reservation.failure is not None:
                raise reservation.failure
            if reservation.is_over or reservation.opened_by is None or reservation.commit is not None:
                raise StaleAttemptError(f"reservation {request.reservation} cannot be committed now")
            reservation.commit = Commit(request.num_frames, list(request.first_tokens), answer)
            reservation.judge()
        self._advance(reservation)

    def abort(self, request: transfer_pb2.AbortRequest) -> None:
        """Ends a transfer that is not committed. Idempotent, and nothing for a reservation that is over."""
        with self._lock:
            try:
                reservation = self._find(request.reservation, request.ref)
            except StaleAttemptError:
                return
            reservation.fail(TransferError(f"aborted: {request.reason}"))
        self._advance(reservation)

    def write(self, frame: Frame, payload: Bytes, origin: Origin, transport: str) -> BatonError | None:
        """Copies one frame into the pool and verifies it there; called by data plane threads.

        Args:
            payload: uint8 [payload_bytes].
            transport: for metrics.

        Returns:
            Why the frame was refused, or None. StaleAttemptError leaves all as it was; others have ended the transfer.
        """
        with self._lock:
            if self._closed:
                return UnavailableError(f"{self.worker} is stopping")
            reservation = self._by_id.get(frame.reservation)
            if reservation is None:
                self._metrics.stale_frames.inc()
                return StaleAttemptError(f"reservation {frame.reservation} of {self.worker} is over")
            try:
                block_ids = reservation.claim(frame, origin)
            except StaleAttemptError as error:
                self._metrics.stale_frames.inc()
                return reservation.failure or error
            except TransferError as error:
                reservation.fail(error)
                block_ids = None
        if block_ids is not None:
            self._copy_in(reservation, frame, block_ids, payload, transport)
        self._advance(reservation)
        return reservation.failure

    def _find(self, reservation_id: int, ref: transfer_pb2.AttemptRef) -> Reservation:
        """The live reservation that a control message names; the lock is held."""
        if self._closed:
            raise UnavailableError(f"{self.worker} is stopping")
        reservation = self._by_id.get(reservation_id)
        if reservation is None or reservation.fenced or reservation.ref != wire.ref_from_wire(ref):
            raise StaleAttemptError(
                f"reservation {reservation_id} of {self.worker} for {ref.request_id}/{ref.attempt} is over"
            )
        return reservation

    def _copy_in(
        self, reservation: Reservation, frame: Frame, block_ids: BlockIds, payload: Bytes, transport: str
    ) -> None:
        """Writes the bytes of a claimed frame; the lock is not held, the claim's pin is."""
        verified = False
        try:
            verified = self._memory.copy_in(frame.slot, block_ids, payload) == frame.checksum
        finally:
            with self._lock:
                reservation.settle(frame, verified=verified)
                reservation.judge()
        if verified:
            self._received_bytes[transport].inc(frame.payload_bytes)
        else:
            self._metrics.failures.labels("checksum").inc()

    def _advance(self, reservation: Reservation) -> None:
        """Tells what has become due: the outcome, the commit's answer, the release. The lock is not held."""
        while True:
            with self._lock:
                due = self._next_due(reservation)
            if due is None:
                return
            due()

    def _next_due(self, reservation: Reservation) -> Callable[[], None] | None:
        """Takes the next thing to tell, so that no other thread tells it too; the lock is held."""
        commit = reservation.commit
        if reservation.state in (State.COMMITTED, State.ABORTED) and not reservation.announced:
            reservation.announced = True
            if not reservation.fenced:
                reservation.commit = None
                reservation.writers += 1
                return functools.partial(self._announce, reservation, commit)
        if reservation.is_over and commit is not None:
            reservation.commit = None
            error = reservation.failure or StaleAttemptError(f"{reservation.ref} was released before its commit")
            return functools.partial(commit.answer, error)
        if reservation.fenced and not reservation.writers and not reservation.returned:
            reservation.returned = True
            del self._by_id[reservation.reservation_id], self._by_ref[reservation.ref]
            self._metrics.reservations.dec()
            return functools.partial(self._events.released, reservation.ref)
        return None

    def _announce(self, reservation: Reservation, commit: Commit | None) -> None:
        """Tells the outcome, pinned, so that `released` comes after it."""
        try:
            if (failure := reservation.failure) is not None:
                self._events.aborted(reservation.ref, failure.message)
            else:
                assert commit is not None, "only a commit commits"
                self._events.committed(reservation.ref, commit.first_tokens)
            if commit is not None:
                commit.answer(failure)
        finally:
            with self._lock:
                reservation.writers -= 1

    def _span(self, group: int, first_block: int, block_ids: Sequence[int]) -> Span:
        ids = np.asarray(block_ids, dtype=np.int64)
        assert NULL_BLOCK < ids.min() <= ids.max() < self._memory.num_blocks, "a reserved block is not in the pool"
        return Span(group, first_block, ids, num_slots=len(self._layout.groups[group].layers))
