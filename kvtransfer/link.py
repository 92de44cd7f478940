"""The way from one sender to one rank of a receiver incarnation: what goes between the two has its wire and its thread.

The link's thread is the only one that reads the pool for what goes this way, and the one that tells how it ended. So a
share of a push of which the thread has told the outcome is not read any more, without further locking. Other threads
only leave work behind: the engine loop its pages, gRPC's threads answers and acknowledgements.
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
from kvtransfer.device import Mark
from kvtransfer.frame import Frame
from kvtransfer.pages import BlockIds, PageMemory
from kvtransfer.push import PushShare
from kvtransfer.transports.base import Control, Transport, TransportUnavailableError, Wire, WireSettings

logger = logging.getLogger(__name__)

_SLEEP_S = 50e-6

# Transports that reach the receiver, best first.
Routes: TypeAlias = "Sequence[tuple[Transport, transfer_pb2.TransportOffer]]"


@dataclasses.dataclass(slots=True)
class _Run:
    """Pages of one (group, slot) that wait to be sent."""

    share: PushShare
    group: int
    slot: int
    first_block: int
    block_ids: BlockIds
    # What writes them; None once it is done.
    mark: Mark | None


@dataclasses.dataclass(frozen=True, slots=True)
class _Commit:
    """Comes after all runs of its share."""

    share: PushShare
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
        self._shares: dict[int, PushShare] = {}
        self._data: collections.deque[_Run | _Commit] = collections.deque()
        # Control messages; they need no room on the wire and overtake data.
        self._calls: collections.deque[Callable[[Control], None]] = collections.deque()
        self._outcomes: collections.deque[tuple[PushShare, BatonError | None]] = collections.deque()
        self._failure: BatonError | None = None
        self._progress_s = 0.0
        self._thread = threading.Thread(target=self._run, name=f"kv-link-{settings.worker}", daemon=True)

    def start(self) -> None:
        """Starts the thread, after the first share was added, if there is one: a link may fail at once."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        """Whether it takes nothing any more."""
        return self._failure is not None

    def add(self, share: PushShare) -> None:
        """Opens a share of a push.

        Raises:
            DuplicateRequestError: its reservation has one.
            BatonError: the link has failed.
        """
        with self._wake:
            if self._failure is not None:
                raise self._failure
            if share.reservation in self._shares:
                raise DuplicateRequestError(f"reservation {share.reservation} of {self._settings.worker} has a push")
            self._shares[share.reservation] = share
            self._calls.append(functools.partial(self._open, share))
            self._wake.notify()

    def send(self, share: PushShare, group: int, slot: int, first_block: int, block_ids: BlockIds) -> None:
        assert NULL_BLOCK < block_ids.min() <= block_ids.max() < self._memory.num_blocks, (
            "a sent block is not in the pool"
        )
        self._queue(_Run(share, group, slot, first_block, block_ids, self._memory.mark()))

    def commit(self, share: PushShare, first_tokens: list[transfer_pb2.FirstToken]) -> None:
        self._queue(_Commit(share, first_tokens))

    def end(self, share: PushShare, error: BatonError | None) -> None:
        """Ends a share, once; the link's thread tells it."""
        with self._wake:
            if not self._is_current(share):
                return
            del self._shares[share.reservation]
            self._outcomes.append((share, error))
            if error is not None:
                self._calls.append(functools.partial(_abort, share, error.message))
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
            share = self._shares.get(reservation)
        if share is not None:
            self.end(share, error)

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
        self._drain(wire, control)
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
                    return functools.partial(self._tell, *self._outcomes.popleft(), wire)
                if self._failure is not None:
                    raise self._failure
                if self._calls:
                    return functools.partial(self._calls.popleft(), control)
                while self._data and not self._is_current(self._data[0].share):
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
        share = run.share
        page_bytes = share.heads.count * self._memory.head_bytes
        num_blocks = max(1, wire.max_payload_bytes // page_bytes)
        block_ids = run.block_ids[:num_blocks]
        # Of several frames in a row the wire decides which are to be acknowledged.
        nothing_follows = len(self._data) == 1 and len(block_ids) == len(run.block_ids)
        frame = Frame(
            reservation=share.reservation,
            attempt=share.attempt,
            seq=share.num_frames,
            group=run.group,
            slot=run.slot,
            first_head=share.heads.first,
            num_heads=share.heads.count,
            first_block=run.first_block,
            num_blocks=len(block_ids),
            payload_bytes=len(block_ids) * page_bytes,
            acknowledge=nothing_follows,
        )
        if run.mark is not None:
            if not _is_done_soon(run.mark):
                # What has been sent need not wait for these pages to be computed.
                wire.flush()
                run.mark.synchronize()
            run.mark = None
        wire.send(frame, self._memory, block_ids)
        share.count(frame)
        self._sent_bytes.inc(frame.payload_bytes)
        run.first_block += frame.num_blocks
        run.block_ids = run.block_ids[frame.num_blocks :]
        if not len(run.block_ids):
            with self._wake:
                # Others append at the far end only, so the first run is still this one.
                self._data.popleft()

    def _open(self, share: PushShare, control: Control) -> None:
        with self._wake:
            if not self._is_current(share):
                return
        request = transfer_pb2.OpenRequest(
            ref=share.push.ticket.ref,
            reservation=share.reservation,
            layout=self._fingerprint,
            first_head=share.heads.first,
            num_heads=share.heads.count,
        )
        control.open(request, functools.partial(self._opened, share))

    def _opened(self, share: PushShare, error: BatonError | None) -> None:
        # Its pages follow Open without waiting: of a share that is not let in the receiver refuses every frame.
        if error is not None:
            self.end(share, error)

    def _commit(self, job: _Commit, wire: Wire, control: Control) -> None:
        wire.flush()
        share = job.share
        request = transfer_pb2.CommitRequest(
            ref=share.push.ticket.ref,
            reservation=share.reservation,
            num_frames=share.num_frames,
            first_tokens=job.first_tokens,
        )
        control.commit(request, functools.partial(self.end, share))

    def _tell(self, share: PushShare, error: BatonError | None, wire: Wire | None) -> None:
        """Tells the outcome of a share, which nobody reads any more."""
        if wire is not None:
            wire.withdraw(share.reservation)
        share.finish()
        if error is None:
            self._metrics.transfer_s.labels(self.transport).observe(share.transfer_s)
            self._metrics.transfer_bytes.labels(self.transport).observe(share.bytes_sent)
            if share.sending_s:
                self._metrics.throughput.labels(self.transport).observe(share.bytes_sent / share.sending_s)
        elif not share.aborted:
            self._metrics.failures.labels(error.status.lower()).inc()
        try:
            share.push.share_ended(error)
        except Exception:
            ref = share.push.ref
            logger.exception("on_done of a push failed", extra={"request": RequestName(ref.request_id, ref.attempt)})

    def _drain(self, wire: Wire | None, control: Control | None) -> None:
        """Ends what is left when the link has failed: tells every push, and the receiver if it still listens."""
        with self._wake:
            error = self._failure
            assert error is not None, "a link ends by failing"
            for share in self._shares.values():
                self._outcomes.append((share, error))
                self._calls.append(functools.partial(_abort, share, error.message))
            self._shares.clear()
            self._data.clear()
            outcomes, calls = list(self._outcomes), list(self._calls)
            self._outcomes.clear()
            self._calls.clear()
        for share, outcome in outcomes:
            self._tell(share, outcome, wire)
        if control is not None:
            for call in calls:
                call(control)

    def _queue(self, job: _Run | _Commit) -> None:
        with self._wake:
            if self._is_current(job.share):
                self._data.append(job)
                self._wake.notify()

    def _is_current(self, share: PushShare) -> bool:
        return self._shares.get(share.reservation) is share

    def _fail(self, error: BatonError) -> None:
        with self._wake:
            if self._failure is None:
                self._failure = error
            self._wake.notify()


def _is_done_soon(mark: Mark) -> bool:
    """Whether it is done by the time that it takes to put this thread to sleep and wake it up again."""
    deadline_s = time.monotonic() + _SLEEP_S
    while not mark.query():
        if time.monotonic() > deadline_s:
            return False
        # Others may have the GIL.
        time.sleep(0)
    return True


def _abort(share: PushShare, reason: str, control: Control) -> None:
    control.abort(transfer_pb2.AbortRequest(ref=share.push.ticket.ref, reservation=share.reservation, reason=reason))
