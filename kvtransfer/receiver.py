"""The receiving end of KV transfers: alone writes arriving bytes into the pool of its rank.

The leader reserves, releases and aborts; data plane threads open, write and commit. One lock guards all reservations.
It is never held while bytes are copied or a callback runs: whoever does either pins the reservation (its writer count),
and a release takes effect when the last pin has gone. So a late or dead sender can never write into blocks that went to
another request: each check-and-pin excludes every fence.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Sequence

import numpy as np

from baton import wire
from baton.config import TransferConfig
from baton.errors import (
    BatonError,
    InternalError,
    StaleAttemptError,
    TransferError,
    UnavailableError,
)
from baton.internal.v1 import transfer_pb2
from baton.metrics import TransferMetrics
from baton.requests import AttemptRef
from engine.kv.layout import NULL_BLOCK, KVLayout
from kvtransfer import transports
from kvtransfer.arrival import Arrival, Carrier, Payload
from kvtransfer.frame import Frame
from kvtransfer.pages import HeadRange, PageMemory, check_memory
from kvtransfer.ranks import LackingBlocks, RankReceiverEvents
from kvtransfer.reservation import Origin, Reservation, Span, State
from kvtransfer.ticket import check_layouts
from kvtransfer.transports.base import Listener, TransportUnavailableError

logger = logging.getLogger(__name__)


class Receiver:
    """Reservations of one rank's pool.

    Args:
        memory: the pool's bytes.
        layout: of this rank's pool.
        fingerprint: what a sender must agree with.
        worker, epoch, rank: this incarnation and its part, which links name.

    Attributes:
        shard: where this rank receives which heads.
        memory: as above.
        max_payload_bytes: largest payload of one frame that is accepted, if it is to pass through the host.
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
        events: RankReceiverEvents,
        *,
        rank: int = 0,
    ) -> None:
        check_memory(memory, layout)
        self.worker = worker
        self.epoch = epoch
        self.rank = rank
        self.shard = transfer_pb2.Shard(first_head=memory.heads.first, num_heads=memory.heads.count)
        self.memory = memory
        self._layout = layout
        self._fingerprint = fingerprint
        self._config = config
        self._metrics = metrics
        self._events = events
        self.max_payload_bytes = max(config.frame_bytes, memory.page_bytes)
        self.timeout_s = config.timeout_s
        self._lock = threading.Lock()
        self._reservations: dict[int, Reservation] = {}
        # The leader's reservations come in the order of their ids.
        self._newest_id = 0
        self._reserved = threading.Condition(self._lock)
        self._listeners: list[Listener] = []
        # Found once, since they are counted for every frame.
        self._received_bytes = {name: metrics.received_bytes.labels(name) for name in transports.TRANSPORTS}
        self._closed = False

    def listen(self, host: str) -> None:
        """Starts the data plane, and completes `shard`; needed before the first `reserve`.

        Args:
            host: address on which transports that need one take a free port.

        Raises:
            UnavailableError: none of the configured transports can be used here.
        """
        assert not self._listeners, "listen is called once"
        for name in self._config.transports:
            transport = transports.load(name)
            if not transport.carries(self.memory):
                continue
            try:
                self._listeners.append(transport.listen(self, host))
            except TransportUnavailableError as error:
                logger.warning("no KV can come by %s: %s", name, error)
        if not self._listeners:
            raise UnavailableError(f"no KV can come by any of {', '.join(self._config.transports)}")
        self.shard.offers.extend(listener.offer for listener in self._listeners)

    def close(self) -> None:
        """Stops the data plane; what comes later is refused. Idempotent."""
        with self._lock:
            self._closed = True
            self._reserved.notify_all()
        for listener in self._listeners:
            listener.close()

    # What the leader calls

    def reserve(self, reservation: int, ref: AttemptRef, blocks: LackingBlocks) -> None:
        """See `ReceivingRank`."""
        assert self._listeners, "listen comes before reserve"
        assert reservation > self._newest_id, "reservations come in the order of their ids"
        spans = [self._span(group, first_block, block_ids) for group, first_block, block_ids in blocks if block_ids]
        memory = self.memory
        found = Reservation(ref, reservation, spans, memory.heads, memory.head_bytes)
        found.mark = memory.mark()
        with self._lock:
            self._reservations[reservation] = found
            self._newest_id = reservation
            self._reserved.notify_all()
            self._metrics.reservations.inc()

    def release(self, reservation: int) -> None:
        """Fences a reservation; `events.released` follows once nobody writes, perhaps within this call. Idempotent."""
        with self._lock:
            if (found := self._reservations.get(reservation)) is None:
                return
            found.fenced = True
        self._advance(found)

    def abort(self, request: transfer_pb2.AbortRequest) -> None:
        """Ends a transfer that is not committed. Idempotent, and nothing for a reservation that is over."""
        with self._lock:
            try:
                reservation = self._find(request.reservation, request.ref)
            except StaleAttemptError:
                return
            reservation.fail(TransferError(f"aborted: {request.reason}"))
        self._advance(reservation)

    # What data plane threads call

    def open(self, request: transfer_pb2.OpenRequest, origin: Origin) -> None:
        """Lets a sender in.

        Raises:
            StaleAttemptError: the reservation is over, another attempt's, open for another worker or for these heads.
            LayoutMismatchError: the pools differ.
            TransferError: these are no heads of the pool.
        """
        with self._lock:
            if self.rank:
                # The ticket may be with the sender before the leader's word, which waits for a step, has come here. Not
                # for so long that the sender gives the whole link up.
                self._reserved.wait_for(
                    lambda: self._closed or self._newest_id >= request.reservation, timeout=self.timeout_s / 2
                )
            reservation = self._find(request.reservation, request.ref)
            check_layouts(self._fingerprint, request.layout)
            reservation.open(origin, HeadRange(request.first_head, request.num_heads))

    def commit(self, request: transfer_pb2.CommitRequest, origin: Origin) -> None:
        """Ends what one sender sends; comes after its last frame, from the same thread.

        Raises:
            StaleAttemptError: the reservation is over, not open for this sender, or committed by it.
            TransferError: not all of `num_frames` verified frames have arrived, they do not cover all that the ticket
                asks for, or the transfer has failed before.
        """
        with self._lock:
            reservation = self._find(request.reservation, request.ref)
            reservation.commit(origin, request.num_frames, request.first_tokens)
        self._advance(reservation)
        if reservation.failure is not None:
            raise reservation.failure
        if reservation.fenced and not reservation.announced:
            raise StaleAttemptError(f"{reservation.ref} was released before its commit")

    def write(
        self, arrivals: Sequence[tuple[Frame, Payload]], origin: Origin, carrier: Carrier[Payload]
    ) -> list[BatonError | None]:
        """Copies frames into the pool and verifies them there; called by data plane threads.

        Args:
            arrivals: frames with their payloads, of which `carrier` knows how to copy them.

        Returns:
            Why each frame was refused, or None. StaleAttemptError leaves all as it was; others have ended the transfer.
        """
        # Each pins its reservation.
        claims: list[tuple[Reservation, Arrival[Payload]]] = []
        with self._lock:
            found = [self._claim(frame, payload, origin, claims) for frame, payload in arrivals]
        try:
            if claims:
                self._copy_in(claims, origin, carrier)
        finally:
            # Also where the copy itself failed: a release may wait for it.
            for reservation in {each for each in found if isinstance(each, Reservation)}:
                self._advance(reservation)
        return [each.failure if isinstance(each, Reservation) else each for each in found]

    def _find(self, reservation_id: int, ref: transfer_pb2.AttemptRef) -> Reservation:
        """The live reservation that a control message names; the lock is held."""
        if self._closed:
            raise UnavailableError(f"{self.worker} is stopping")
        reservation = self._reservations.get(reservation_id)
        if reservation is None or reservation.fenced or reservation.ref != wire.ref_from_wire(ref):
            raise StaleAttemptError(
                f"reservation {reservation_id} of {self.worker} for {ref.request_id}/{ref.attempt} is over"
            )
        return reservation

    def _claim(
        self, frame: Frame, payload: Payload, origin: Origin, claims: list[tuple[Reservation, Arrival[Payload]]]
    ) -> Reservation | BatonError:
        """Adds a frame that is wanted to `claims`; the frame's reservation, or why it is none's. The lock is held."""
        if self._closed:
            return UnavailableError(f"{self.worker} is stopping")
        reservation = self._reservations.get(frame.reservation)
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
        else:
            claims.append((reservation, Arrival(frame, block_ids, payload)))
        return reservation

    def _copy_in(
        self, claims: Sequence[tuple[Reservation, Arrival[Payload]]], origin: Origin, carrier: Carrier[Payload]
    ) -> None:
        """Writes the bytes of claimed frames; the lock is not held, the claims' pins are."""
        failures: Sequence[BatonError | None] | None = None
        try:
            for reservation, _ in claims:
                if (mark := reservation.mark) is not None:
                    mark.synchronize()
                    reservation.mark = None
            failures = carrier.copy_in(self.memory, [arrival for _, arrival in claims])
        finally:
            if failures is None:
                failures = [InternalError("its bytes could not be copied")] * len(claims)
            with self._lock:
                for (reservation, arrival), failure in zip(claims, failures, strict=True):
                    reservation.settle(arrival.frame, origin, failure)
        num_bytes = 0
        for (_, arrival), failure in zip(claims, failures, strict=True):
            if failure is None:
                num_bytes += arrival.frame.payload_bytes
            elif isinstance(failure, StaleAttemptError):
                self._metrics.stale_frames.inc()
            else:
                self._metrics.failures.labels("checksum").inc()
        self._received_bytes[carrier.transport].inc(num_bytes)

    def _advance(self, reservation: Reservation) -> None:
        """Tells what has become due: the outcome, the release. The lock is not held."""
        while True:
            with self._lock:
                due = self._next_due(reservation)
            if due is None:
                return
            due()

    def _next_due(self, reservation: Reservation) -> Callable[[], None] | None:
        """Takes the next thing to tell, so that no other thread tells it too; the lock is held."""
        ended = reservation.state in (State.COMMITTED, State.ABORTED)
        if ended and not reservation.announced and not reservation.fenced:
            reservation.announced = True
            reservation.writers += 1
            return functools.partial(self._announce, reservation)
        if reservation.fenced and not reservation.writers and not reservation.returned:
            reservation.returned = True
            del self._reservations[reservation.reservation_id]
            self._metrics.reservations.dec()
            return functools.partial(self._events.released, reservation.reservation_id)
        return None

    def _announce(self, reservation: Reservation) -> None:
        """Tells the outcome, pinned, so that `released` comes after it."""
        try:
            if reservation.failure is not None:
                self._events.aborted(reservation.reservation_id, reservation.failure.message)
            else:
                self._events.committed(reservation.reservation_id, reservation.first_tokens)
        finally:
            with self._lock:
                reservation.writers -= 1

    def _span(self, group: int, first_block: int, block_ids: Sequence[int]) -> Span:
        ids = np.asarray(block_ids, dtype=np.int64)
        assert NULL_BLOCK < ids.min() <= ids.max() < self.memory.num_blocks, "a reserved block is not in the pool"
        return Span(group, first_block, ids, num_slots=len(self._layout.groups[group].layers))
