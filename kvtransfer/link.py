"""The way from one sender to one receiver incarnation: all pushes between the two share its wire and its thread.

The link's thread is the only one that reads the pool, and the one that tells pushes' outcomes. So a push of which the
thread has told the outcome is not read any more, without further locking. Other threads only leave work behind: the
engine loop its pages, gRPC's threads answers and acknowledgements.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

from prometheus_client import Counter

from baton.errors import BatonError, DuplicateRequestError, InternalError, TransferError, UnavailableError
from baton.internal.v1 import transfer_pb2
from baton.logs import RequestName
from baton.metrics import TransferMetrics
from engine.kv.layout import NULL_BLOCK
from kvtransfer.frame import Frame
from kvtransfer.pages import BlockIds, PageMemory
from kvtransfer.push import Push
from kvtransfer.transports.base import Control, Transport, TransportUnavailableError, Wire, WireSettings

logger = logging.getLogger(__name__)

# Transports that reach the receiver, best first.
Routes: TypeAlias = "Sequence[tuple[Transport, transfer_pb2.TransportOffer]]"


@dataclasses.dataclass(slots=True)
class _Run:
    """Pages of one (group, slot) that wait to be sent."""

    push: Push
    group: int
    slot: int
    first_block: int
    block_ids: BlockIds


@dataclasses.dataclass(frozen=True, slots=True)
class _Commit:
    """Comes after all runs of its push."""

    push: Push
    first_tokens: list[transfer_pb2.FirstToken]


class Link:
    """
    Args:
        settings: who speaks to whom, and the sizes and times of the wire.
        fingerprint: for Open.
    """

    def __init__(
        self,
        routes: Routes,
        settings: WireSettings,
        memory: PageMemory,
        fingerprint: transfer_pb2.LayoutFingerprint,
        metrics: TransferMetrics,
    ) -> None:
        self.transport = ""
        self._routes = routes
        self._settings = settings
        self._memory = memory
        self._fingerprint = fingerprint
        self._metrics = metrics
        # The counter of the transport, found once.
        self._sent_bytes: Counter
        # Guards all that follows.
        self._wake = threading.Condition()
        self._pushes: dict[int, Push] = {}
        self._data: collections.deque[_Run | _Commit] = collections.deque()
        # Control messages; they need no room on the wire and overtake data.
        self._calls: collections.deque[Callable[[Control], None]] = collections.deque()
        self._outcomes: collections.deque[tuple[Push, BatonError | None]] = collections.deque()
        self._failure: BatonError | None = None
        self._progress_s = 0.0
        self._thread = threading.Thread(target=self._run, name=f"kv-link-{settings.worker}", daemon=True)

    def start(self) -> None:
        """Starts the thread. A push is added before, if there is one: a link that fails at once has someone to tell."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def add(self, push: Push) -> bool:
        """Opens a push; False if the link has failed. Raises DuplicateRequestError if its reservation has one."""
        reservation = push.ticket.reservation
        with self._wake:
            if self._failure is not None:
                return False
            if reservation in self._pushes:
                raise DuplicateRequestError(f"reservation {reservation} of {push.ticket.worker} has a push")
            self._pushes[reservation] = push
            self._calls.append(functools.partial(self._open, push))
            self._wake.notify()
        return True

    def send(self, push: Push, group: int, slot: int, first_block: int, block_ids: BlockIds) -> None:
        assert NULL_BLOCK < block_ids.min() <= block_ids.max() < self._memory.num_blocks, (
            "a sent block is not in the pool"
        )
        self._queue(_Run(push, group, slot, first_block, block_ids))

    def commit(self, push: Push, first_tokens: list[transfer_pb2.FirstToken]) -> None:
        self._queue(_Commit(push, first_tokens))

    def end(self, push: Push, error: BatonError | None) -> None:
        """Ends a push, once; the link's thread tells it."""
        with self._wake:
            if self._pushes.pop(push.ticket.reservation, None) is None:
                return
            self._outcomes.append((push, error))
            if error is not None:
                self._calls.append(functools.partial(_abort, push, error.message))
            self._wake.notify()

    def close(self) -> None:
        """Ends all pushes and the thread."""
        self._fail(UnavailableError("the sender was closed"))
        self._thread.join()

    # WireEvents

    def progressed(self) -> None:
        with self._wake:
            self._progress_s = time.monotonic()
            self._wake.notify()

    def refused(self, reservation: int, error: BatonError) -> None:
        with self._wake:
            push = self._pushes.get(reservation)
        if push is not None:
            self.end(push, error)

    def broken(self, error: BatonError) -> None:
        self._fail(error)

    # The link's thread

    def _run(self) -> None:
        wire: Wire | None = None
        control: Control | None = None
        try:
            wire, control = self._connect()
            while True:
                self._next_job(wire, control)()
        except BatonError as error:
            self._fail(error)
        except Exception as error:
            logger.exception("the link to %s failed", self._settings.worker)
            self._fail(InternalError(f"the link to {self._settings.worker} failed: {error!r}"))
        self._drain(control)
        if wire is not None:
            wire.close()
        if control is not None:
            control.close()

    def _connect(self) -> tuple[Wire, Control]:
        """Goes the first way that works."""
        for index, (transport, offer) in enumerate(self._routes):
            try:
                wire, control = transport.connect(offer, self._settings, self)
            except TransportUnavailableError as error:
                if index + 1 == len(self._routes):
                    raise
                self._metrics.fallbacks.labels(transport.name).inc()
                logger.warning("KV to %s cannot go by %s: %s", self._settings.worker, transport.name, error)
                continue
            self.transport = transport.name
            self._sent_bytes = self._metrics.sent_bytes.labels(transport.name)
            return wire, control
        raise AssertionError("a link has a route")

    def _next_job(self, wire: Wire, control: Control) -> Callable[[], None]:
        """Waits for something to do; raises what ended the link."""
        with self._wake:
            while True:
                if not wire.awaits_reply:
                    # With what is sent next the receiver's time to acknowledge begins.
                    self._progress_s = time.monotonic()
                if self._outcomes:
                    return functools.partial(self._tell, *self._outcomes.popleft())
                if self._failure is not None:
                    raise self._failure
                if self._calls:
                    return functools.partial(self._calls.popleft(), control)
                while self._data and not self._is_current(self._data[0].push):
                    self._data.popleft()
                if self._data:
                    job = self._data[0]
                    if isinstance(job, _Commit):
                        self._data.popleft()
                        return functools.partial(self._commit, job, wire, control)
                    if wire.has_room():
                        return functools.partial(self._send_frame, job, wire)
                self._wait(wire)

    def _wait(self, wire: Wire) -> None:
        """Waits for any change; raises TransferError if the receiver has stopped acknowledging. The lock is held."""
        wire.flush()
        if not wire.awaits_reply:
            self._wake.wait()
            return
        left_s = self._progress_s + self._settings.timeout_s - time.monotonic()
        if left_s <= 0:
            raise TransferError(f"{self._settings.worker} acknowledged nothing for {self._settings.timeout_s:g} s")
        self._wake.wait(left_s)

    def _send_frame(self, run: _Run, wire: Wire) -> None:
        """Sends as much of the first run as one frame takes."""
        push, memory = run.push, self._memory
        num_blocks = max(1, wire.max_payload_bytes // memory.page_bytes)
        block_ids = run.block_ids[:num_blocks]
        # Of several frames in a row the wire decides which are to be acknowledged.
        nothing_follows = len(self._data) == 1 and len(block_ids) == len(run.block_ids)
        frame = Frame(
            reservation=push.ticket.reservation,
            attempt=push.ref.attempt,
            seq=push.num_frames,
            group=run.group,
            slot=run.slot,
            first_block=run.first_block,
            num_blocks=len(block_ids),
            payload_bytes=len(block_ids) * memory.page_bytes,
            acknowledge=nothing_follows,
        )
        wire.send(frame, memory, block_ids)
        push.count(frame)
        self._sent_bytes.inc(frame.payload_bytes)
        run.first_block += frame.num_blocks
        run.block_ids = run.block_ids[frame.num_blocks :]
        if not len(run.block_ids):
            with self._wake:
                # Others append at the far end only, so the first run is still this one.
                self._data.popleft()

    def _open(self, push: Push, control: Control) -> None:
        with self._wake:
            if not self._is_current(push):
                return
        request = transfer_pb2.OpenRequest(
            ref=push.ticket.ref,
            reservation=push.ticket.reservation,
            layout=self._fingerprint,
            sender=self._settings.origin.sender,
            sender_epoch=self._settings.origin.epoch,
            transport=self.transport,
        )
        control.open(request, functools.partial(self._opened, push))

    def _opened(self, push: Push, error: BatonError | None) -> None:
        # Its pages follow Open without waiting: of a push that is not let in the receiver refuses every frame.
        if error is not None:
            self.end(push, error)

    def _commit(self, job: _Commit, wire: Wire, control: Control) -> None:
        wire.flush()
        push = job.push
        request = transfer_pb2.CommitRequest(
            ref=push.ticket.ref,
            reservation=push.ticket.reservation,
            num_frames=push.num_frames,
            first_tokens=job.first_tokens,
        )
        control.commit(request, functools.partial(self.end, push))

    def _tell(self, push: Push, error: BatonError | None) -> None:
        """Tells the outcome of a push, which nobody reads any more."""
        push.finish()
        if error is None:
            self._metrics.transfer_s.labels(self.transport).observe(push.transfer_s)
            self._metrics.transfer_bytes.labels(self.transport).observe(push.bytes_sent)
            if push.sending_s:
                self._metrics.throughput.labels(self.transport).observe(push.bytes_sent / push.sending_s)
        elif not push.aborted:
            self._metrics.failures.labels(error.status.lower()).inc()
        try:
            push.on_done(push, error)
        except Exception:
            name = RequestName(push.ref.request_id, push.ref.attempt)
            logger.exception("on_done of a push failed", extra={"request": name})

    def _drain(self, control: Control | None) -> None:
        """Ends what is left when the link has failed: tells every push, and the receiver if it still listens."""
        with self._wake:
            error = self._failure
            assert error is not None, "a link ends by failing"
            for push in self._pushes.values():
                self._outcomes.append((push, error))
                self._calls.append(functools.partial(_abort, push, error.message))
            self._pushes.clear()
            self._data.clear()
            outcomes, calls = list(self._outcomes), list(self._calls)
            self._outcomes.clear()
            self._calls.clear()
        for push, outcome in outcomes:
            self._tell(push, outcome)
        if control is not None:
            for call in calls:
                call(control)

    def _queue(self, job: _Run | _Commit) -> None:
        with self._wake:
            if self._is_current(job.push):
                self._data.append(job)
                self._wake.notify()

    def _is_current(self, push: Push) -> bool:
        return self._pushes.get(push.ticket.reservation) is push

    def _fail(self, error: BatonError) -> None:
        with self._wake:
            if self._failure is None:
                self._failure = error
            self._wake.notify()


def _abort(push: Push, reason: str, control: Control) -> None:
    control.abort(transfer_pb2.AbortRequest(ref=push.ticket.ref, reservation=push.ticket.reservation, reason=reason))
