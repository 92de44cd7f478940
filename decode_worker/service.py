"""The decode worker's gRPC service: reservations, and one multiplexed stream of tokens to each router."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc

from baton.errors import BatonError, InvalidRequestError, StaleAttemptError
from baton.internal.v1 import transfer_pb2, worker_pb2, worker_pb2_grpc
from baton.requests import AttemptRef, RequestSpec
from baton.wire import ref_from_wire, ref_to_wire, spec_from_wire
from decode_worker.loop import DecodeLoop
from decode_worker.outbox import Outbox
from decode_worker.tracing import DecodeTrace
from engine.grammar import CompiledGrammar, Grammars
from kvtransfer.lease import LeaseTable
from worker.engine_thread import EngineThread
from worker.grammar import compiled_grammar
from worker.host import abort, metadata
from worker.watch import WatchPublisher

if TYPE_CHECKING:
    from baton.tracing.tracer import Tracer

Context = grpc.aio.ServicerContext[Any, Any]


class DecodeService(worker_pb2_grpc.DecodeWorkerServicer):
    """Speaks for one `DecodeLoop`. Handlers run on the event loop; what they ask for runs on the engine thread."""

    def __init__(
        self,
        loop: DecodeLoop,
        thread: EngineThread,
        outbox: Outbox,
        *,
        epoch: int,
        grammars: Grammars,
        leases: LeaseTable,
        watch: WatchPublisher,
        tracer: Tracer | None = None,
    ) -> None:
        self._tracer = tracer
        self._loop = loop
        self._thread = thread
        self._outbox = outbox
        self._epoch = epoch
        self._grammars = grammars
        self._leases = leases
        self._watch = watch

    async def Reserve(  # noqa: N802
        self, request: worker_pb2.ReserveRequest, context: Context
    ) -> worker_pb2.ReserveResponse:
        spec = spec_from_wire(request.spec)
        trace = None
        if self._tracer is not None:
            trace = DecodeTrace(
                self._tracer, metadata(context), spec, local_prefill=request.local_prefill, clock=time.monotonic
            )
        try:
            grammar = await compiled_grammar(self._grammars, spec)
        except BatonError as error:
            if trace is not None:
                trace.rejected(error)
            await abort(context, error)
            raise
        call = self._thread.call(
            lambda: self._reserve(spec, local_prefill=request.local_prefill, grammar=grammar, trace=trace)
        )
        try:
            return await asyncio.wrap_future(call)
        except BatonError as error:
            await abort(context, error)
            raise
        except asyncio.CancelledError:
            # The router is gone or gave up; what the engine thread may still reserve must not outlive the call.
            self._thread.post(lambda: self._loop.cancel(spec.ref))
            raise

    def _reserve(
        self, spec: RequestSpec, *, local_prefill: bool, grammar: CompiledGrammar | None, trace: DecodeTrace | None
    ) -> worker_pb2.ReserveResponse:
        """On the engine thread. Whatever is granted owns its trace from then on."""
        try:
            response = self._loop.reserve(spec, local_prefill=local_prefill, grammar=grammar, trace=trace)
        except BatonError as error:
            if trace is not None:
                trace.rejected(error)
            raise
        if trace is not None and response.HasField("refusal"):
            trace.refused(response.refusal.reason)
        return response

    async def Attach(  # noqa: N802
        self, request_iterator: AsyncIterator[worker_pb2.AttachRequest], context: Context
    ) -> AsyncIterator[worker_pb2.StepOutput]:
        first = await anext(request_iterator, None)
        if first is None or not first.HasField("hello"):
            await abort(context, InvalidRequestError("hello", "must come first"))
            return
        hello = first.hello
        if hello.epoch != self._epoch:
            await abort(context, StaleAttemptError(f"this worker's epoch is {self._epoch}, not {hello.epoch}"))
        outputs = self._outbox.attach(hello.router_id, hello.cursors)
        self._post_ends(hello.cursors)
        reader = asyncio.create_task(self._read(request_iterator))
        try:
            async for output in outputs:
                yield output
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            await outputs.aclose()

    async def _read(self, requests: AsyncIterator[worker_pb2.AttachRequest]) -> None:
        async for request in requests:
            for ref in self._outbox.acknowledge(request.acks):
                self._leases.release(ref)
            # Even with nothing ended: a paused sequence may go on.
            self._post_ends(request.acks, request.cancels)

    async def Cancel(  # noqa: N802
        self, request: worker_pb2.CancelRequest, context: Context
    ) -> worker_pb2.CancelResponse:
        self._post_ends((), request.refs)
        return worker_pb2.CancelResponse()

    def _post_ends(self, cursors: Iterable[worker_pb2.Cursor], cancels: Iterable[transfer_pb2.AttemptRef] = ()) -> None:
        """One command for a whole message: which choices and attempts the router has ended."""
        ended = [(ref_from_wire(cursor.ref), cursor.choice) for cursor in cursors if cursor.ended]
        cancelled = [ref_from_wire(ref) for ref in cancels]
        self._thread.post(partial(self._end, ended, cancelled))

    def _end(self, ended: Iterable[tuple[AttemptRef, int]], cancelled: Iterable[AttemptRef]) -> None:
        """On the engine thread."""
        for ref, choice in ended:
            self._loop.end_choice(ref, choice)
        for ref in cancelled:
            self._loop.cancel(ref)

    async def RenewLeases(  # noqa: N802
        self, request: worker_pb2.RenewLeasesRequest, context: Context
    ) -> worker_pb2.RenewLeasesResponse:
        unknown = self._leases.renew([ref_from_wire(ref) for ref in request.refs])
        return worker_pb2.RenewLeasesResponse(unknown=map(ref_to_wire, unknown))

    async def Watch(  # noqa: N802
        self, request: worker_pb2.WatchRequest, context: Context
    ) -> AsyncIterator[worker_pb2.WorkerState]:
        async for state in self._watch.watch():
            yield state
