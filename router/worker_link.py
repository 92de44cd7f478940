"""All that the router holds of one worker incarnation: its channel, its streams, and its view for the snapshot.

Made and closed by `membership`, used by the pipeline; all on the router's event loop.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import grpc.aio

from baton.client.channel import baton_errors, channel_options
from baton.errors import BatonError, DeadlineError, StaleAttemptError, UnavailableError
from baton.internal.v1 import transfer_pb2, worker_pb2, worker_pb2_grpc
from baton.tracing import Metadata
from router.attach import AttachStream
from router.leases import LeaseRenewal
from router.recovery import Failure, FailureKind
from router.request_state import Attempt
from router.snapshot import WorkerKey, WorkerView
from router.watch import WatchStream

_log = logging.getLogger(__name__)

_MAX_BACKOFF_S = 1.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LinkOptions:
    """What all links of a router share.

    Attributes:
        call_timeout_s: longest time that a Reserve may take.
        max_unacked_tokens: as decode workers are told with each request.
    """

    router_id: str
    lease_s: float
    call_timeout_s: float
    max_message_bytes: int
    max_unacked_tokens: int = 1024

    @property
    def reattach_s(self) -> float:
        """A worker that cannot be reached for this long is taken for dead, well before its leases run out."""
        return self.lease_s / 3


class _Tasks:
    """Background tasks of one link."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def open_channel(address: str, max_message_bytes: int) -> grpc.aio.Channel:
    """A channel that notices quickly when its peer is back."""
    reconnect = [
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 2000),
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]
    return grpc.aio.insecure_channel(address, options=[*channel_options(max_message_bytes), *reconnect])


def _view(info: worker_pb2.WorkerInfo, watch: WatchStream, *, connected: bool) -> WorkerView:
    state = watch.state or worker_pb2.WorkerState()
    return WorkerView(
        key=WorkerKey(info.name, info.epoch),
        role=info.role,
        address=info.address,
        metrics_address=info.metrics_address,
        rank_metrics_addresses=tuple(info.rank_metrics_addresses),
        pid=info.pid,
        block_size=info.block_size,
        num_groups=max(len(info.layout.groups), 1),
        connected=connected,
        draining=state.draining,
        running=state.running,
        waiting=state.waiting,
        free_blocks=state.free_blocks,
        total_blocks=state.total_blocks or info.total_blocks,
        queued_tokens=state.queued_tokens,
        token_credit=state.token_credit,
        cached=watch.cached,
    )


class PrefillLink:
    """A prefill worker.

    Args:
        on_change: called with the key after every change of the worker's view.
    """

    def __init__(
        self, info: worker_pb2.WorkerInfo, options: LinkOptions, on_change: Callable[[WorkerKey], None]
    ) -> None:
        self.info = info
        self.key = WorkerKey(info.name, info.epoch)
        self._channel = open_channel(info.address, options.max_message_bytes)
        self._stub: worker_pb2_grpc.PrefillWorkerAsyncStub = worker_pb2_grpc.PrefillWorkerStub(self._channel)
        self._renew_timeout_s = options.lease_s / 3
        self._legs: dict[Attempt, asyncio.Task[None]] = {}
        self._tasks = _Tasks()
        self._watch = WatchStream(
            self._stub.Watch,
            options.router_id,
            info.name,
            lambda: on_change(self.key),
            max_backoff_s=_MAX_BACKOFF_S,
        )
        leases = LeaseRenewal(
            self._renew,
            router_id=options.router_id,
            lease_s=options.lease_s,
            attempts=lambda: list(self._legs),
            on_lost=self._lease_lost,
            on_unreachable=lambda: self._fail_legs(f"{info.name} cannot be reached"),
        )
        self._tasks.start(self._watch.run())
        self._tasks.start(leases.run())

    @property
    def view(self) -> WorkerView:
        return _view(self.info, self._watch, connected=self._watch.state is not None)

    def start(self, request: worker_pb2.PrefillRequest, attempt: Attempt, metadata: Metadata = ()) -> None:
        """Begins a prefill; the attempt hears of its events, and of its failure."""
        task = self._tasks.start(self._run_leg(request, attempt, metadata))
        self._legs[attempt] = task
        task.add_done_callback(lambda _: self._legs.pop(attempt, None))

    def cancel(self, attempt: Attempt) -> None:
        """Ends the attempt's prefill call, which cancels it at the worker; nothing where it is over."""
        if (task := self._legs.get(attempt)) is not None:
            task.cancel()

    async def close(self) -> None:
        self._fail_legs(f"{self.info.name} is gone")
        await self._tasks.close()
        await self._channel.close()

    async def _run_leg(self, request: worker_pb2.PrefillRequest, attempt: Attempt, metadata: Metadata) -> None:
        call = self._stub.Prefill(request, metadata=tuple(metadata))
        done = False
        try:
            with baton_errors():
                async for event in call:
                    attempt.prefilled(event)
                    done = event.WhichOneof("event") == "done"
            if not done:
                raise UnavailableError(f"{self.info.name} ended a prefill early")
        except BatonError as error:
            attempt.prefill_failed(error, self.key)
        finally:
            call.cancel()

    def _lease_lost(self, attempt: Attempt) -> None:
        self._fail_leg(attempt, StaleAttemptError(f"{self.info.name} no longer holds the request"))

    def _fail_legs(self, reason: str) -> None:
        for attempt in list(self._legs):
            self._fail_leg(attempt, UnavailableError(reason))

    def _fail_leg(self, attempt: Attempt, error: BatonError) -> None:
        attempt.prefill_failed(error, self.key)
        self.cancel(attempt)

    async def _renew(self, request: worker_pb2.RenewLeasesRequest) -> worker_pb2.RenewLeasesResponse:
        return await self._stub.RenewLeases(request, timeout=self._renew_timeout_s)


class DecodeLink:
    """A decode worker.

    Args:
        on_change: called with the key after every change of the worker's view.
    """

    def __init__(
        self, info: worker_pb2.WorkerInfo, options: LinkOptions, on_change: Callable[[WorkerKey], None]
    ) -> None:
        self.info = info
        self.key = WorkerKey(info.name, info.epoch)
        self._options = options
        self._channel = open_channel(info.address, options.max_message_bytes)
        self._stub: worker_pb2_grpc.DecodeWorkerAsyncStub = worker_pb2_grpc.DecodeWorkerStub(self._channel)
        self._tasks = _Tasks()
        self._closed = False
        self._watch = WatchStream(
            self._stub.Watch,
            options.router_id,
            info.name,
            lambda: on_change(self.key),
            max_backoff_s=_MAX_BACKOFF_S,
        )
        self.attach = AttachStream(
            self._stub,
            self.key,
            options.router_id,
            lambda: on_change(self.key),
            reattach_s=options.reattach_s,
            max_unacked_tokens=options.max_unacked_tokens,
        )
        leases = LeaseRenewal(
            self._renew,
            router_id=options.router_id,
            lease_s=options.lease_s,
            attempts=self._leased,
            on_lost=self._lease_lost,
            on_unreachable=self.attach.reset,
        )
        for coroutine in (self._watch.run(), self.attach.run(), leases.run()):
            self._tasks.start(coroutine)

    @property
    def view(self) -> WorkerView:
        return _view(self.info, self._watch, connected=self._watch.state is not None and self.attach.up)

    async def reserve(self, request: worker_pb2.ReserveRequest, metadata: Metadata = ()) -> worker_pb2.ReserveResponse:
        """Asks for blocks; UnavailableError where the worker does not answer in time or is closed meanwhile."""
        try:
            with baton_errors():
                return await self._stub.Reserve(request, timeout=self._options.call_timeout_s, metadata=tuple(metadata))
        except DeadlineError as error:
            raise UnavailableError(f"{self.info.name} did not answer a reservation in time") from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed and task is not None and not task.cancelling():
                # Closing the channel cancels its calls; the request itself goes on.
                raise UnavailableError(f"{self.info.name} is gone") from None
            raise

    def cancel(self, ref: transfer_pb2.AttemptRef) -> None:
        """Releases an attempt at the worker, also one whose Reserve is still on its way. Never waits."""
        if not self._closed and not self.attach.cancel(ref):
            self._tasks.start(self._cancel_by_call(ref))

    async def close(self) -> None:
        self._closed = True
        self.attach.fail_all(f"{self.info.name} is gone")
        await self._tasks.close()
        await self._channel.close()

    def _leased(self) -> list[Attempt]:
        return [attempt for attempt in self.attach.attempts if attempt.reserved and not attempt.ended_on_worker]

    def _lease_lost(self, attempt: Attempt) -> None:
        error = StaleAttemptError(f"{self.info.name} no longer holds the request")
        attempt.fail(Failure(FailureKind.LEASE_LOST, error, self.key))

    async def _cancel_by_call(self, ref: transfer_pb2.AttemptRef) -> None:
        try:
            await self._stub.Cancel(worker_pb2.CancelRequest(refs=[ref]), timeout=self._options.reattach_s)
        except grpc.aio.AioRpcError as error:
            # The lease runs out by itself.
            _log.debug("%s was not told of a cancel: %s", self.info.name, error.details())

    async def _renew(self, request: worker_pb2.RenewLeasesRequest) -> worker_pb2.RenewLeasesResponse:
        return await self._stub.RenewLeases(request, timeout=self._options.lease_s / 3)
