"""The prefill worker's gRPC service: commands in, events out. Handlers run on the event loop, the loop's work
elsewhere."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc

from baton.errors import BatonError, InternalError
from baton.internal.v1 import worker_pb2, worker_pb2_grpc
from baton.wire import ref_from_wire, ref_to_wire, spec_from_wire
from engine.grammar import Grammars
from kvtransfer.lease import LeaseTable
from prefill_worker.loop import PrefillLoop
from prefill_worker.tracing import PrefillTrace
from worker.engine_thread import EngineThread
from worker.grammar import compiled_grammar
from worker.host import abort, metadata
from worker.watch import WatchPublisher

if TYPE_CHECKING:
    from baton.tracing.tracer import Tracer


class PrefillService(worker_pb2_grpc.PrefillWorkerServicer):
    """Speaks for one `PrefillLoop`."""

    def __init__(
        self,
        loop: PrefillLoop,
        thread: EngineThread,
        *,
        grammars: Grammars,
        leases: LeaseTable,
        watch: WatchPublisher,
        tracer: Tracer | None = None,
    ) -> None:
        self._tracer = tracer
        self._loop = loop
        self._thread = thread
        self._grammars = grammars
        self._leases = leases
        self._watch = watch

    async def Prefill(  # noqa: N802
        self, request: worker_pb2.PrefillRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[worker_pb2.PrefillEvent]:
        spec = spec_from_wire(request.spec)
        trace = None
        if self._tracer is not None:
            trace = PrefillTrace(self._tracer, metadata(context), spec, time.monotonic)
        event_loop = asyncio.get_running_loop()
        events: asyncio.Queue[worker_pb2.PrefillEvent | BatonError] = asyncio.Queue()

        def emit(event: worker_pb2.PrefillEvent | BatonError) -> None:
            event_loop.call_soon_threadsafe(events.put_nowait, event)

        def submitted(call: Future[None]) -> None:
            if (error := call.exception()) is not None:
                emit(InternalError(f"the prompt was not taken: {type(error).__name__}: {error}"))

        ended = False
        try:
            try:
                grammar = await compiled_grammar(self._grammars, spec)
            except BatonError as error:
                events.put_nowait(error)
            else:
                call = self._thread.call(lambda: self._loop.submit(spec, request.ticket, emit, grammar=grammar))
                call.add_done_callback(submitted)
            while not ended:
                event = await events.get()
                if trace is not None:
                    trace.saw(event)
                if isinstance(event, BatonError):
                    ended = True
                    await abort(context, event)
                else:
                    ended = event.HasField("done")
                    yield event
        finally:
            if not ended:
                self._thread.post(lambda: self._loop.cancel(spec.ref))
            if trace is not None:
                trace.end()

    async def Cancel(  # noqa: N802
        self, request: worker_pb2.CancelRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.CancelResponse:
        for ref in map(ref_from_wire, request.refs):
            self._thread.post(partial(self._loop.cancel, ref))
        return worker_pb2.CancelResponse()

    async def RenewLeases(  # noqa: N802
        self, request: worker_pb2.RenewLeasesRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.RenewLeasesResponse:
        unknown = self._leases.renew([ref_from_wire(ref) for ref in request.refs])
        return worker_pb2.RenewLeasesResponse(unknown=map(ref_to_wire, unknown))

    async def Watch(  # noqa: N802
        self, request: worker_pb2.WatchRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[worker_pb2.WorkerState]:
        async for state in self._watch.watch():
            yield state
