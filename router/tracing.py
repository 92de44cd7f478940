"""Spans of requests, as the router sees them: one for the request, and under it one for each stage of each attempt.

Made by `router.server` where tracing is on, and by nobody else. The names of attributes are those of OpenTelemetry's
GenAI conventions; what these have no name for begins with `baton.`. No prompt and nothing generated gets in.
"""

from __future__ import annotations

import contextvars
import dataclasses
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from starlette.types import ASGIApp, Receive, Scope, Send

from baton.errors import BatonError
from baton.requests import FinishReason
from baton.tracing import TRACEPARENT, Attributes, AttributeValue, Metadata
from baton.v1 import inference_pb2
from router.job import Job
from router.observation import Observer
from router.placement import Placement
from router.recovery import Failure, FailureKind
from router.timeline import Leg

if TYPE_CHECKING:
    from baton.tracing.tracer import Span, Tracer

_GENERATE = "/baton.v1.Inference/Generate"
_PROPAGATED = frozenset({TRACEPARENT, "tracestate"})
# What a server is to blame for, as the conventions for gRPC have it; the rest is the client's doing.
_OUR_FAULT = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
_EVENTS = {FailureKind.PREEMPTED: "baton.preemption", FailureKind.REFUSED: "baton.refusal"}
_RETRY = "baton.retry"


@dataclasses.dataclass(frozen=True, slots=True)
class Incoming:
    """The call that a request came with.

    Attributes:
        context: the client's trace context.
        operation: as the conventions name it.
        arrived_s: in monotonic seconds.
    """

    context: Metadata = ()
    operation: str = "text_completion"
    arrived_s: float | None = None


_incoming: contextvars.ContextVar[Incoming | None] = contextvars.ContextVar("incoming", default=None)


class TraceInterceptor(grpc.aio.ServerInterceptor):
    """Remembers the trace context of a gRPC call for the task that serves it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        if details.method == _GENERATE:
            metadata = ((key, value) for key, value in details.invocation_metadata or () if isinstance(value, str))
            _incoming.set(Incoming(_propagated(metadata), arrived_s=self._clock()))
        return await continuation(details)


class TraceMiddleware:
    """Remembers the trace context of an HTTP request for the task that serves it."""

    def __init__(self, app: ASGIApp, clock: Callable[[], float]) -> None:
        self._app = app
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = ((key.decode("latin-1"), value.decode("latin-1")) for key, value in scope["headers"])
            operation = "chat" if scope["path"].endswith("/chat/completions") else "text_completion"
            _incoming.set(Incoming(_propagated(headers), operation, self._clock()))
        await self._app(scope, receive, send)


def _propagated(pairs: Iterable[tuple[str, str]]) -> Metadata:
    return tuple((key, value) for key, value in pairs if key in _PROPAGATED)


@dataclasses.dataclass(slots=True, eq=False)
class _Trace:
    """A request's span, and the attempt under way."""

    span: Span
    leg: Leg
    number: int = 1
    decode_worker: str = ""
    has_tokens: bool = False


class RequestTraces(Observer):
    """Follows each request from its acceptance to its end.

    Args:
        model: the served model's name.
        clock: monotonic seconds.
    """

    def __init__(self, tracer: Tracer, *, model: str, clock: Callable[[], float]) -> None:
        self._tracer = tracer
        self._model = model
        self._clock = clock
        self._traces: dict[Job, _Trace] = {}

    def accepted(self, job: Job) -> None:
        incoming, now = _incoming.get() or Incoming(), self._clock()
        span = self._start(incoming, job.arrived_at, _request_attributes(job))
        span.child("intake", job.arrived_at, now, {})
        job.trace_context = span.context
        self._traces[job] = _Trace(span, Leg(now))

    def admitted(self, job: Job) -> None:
        trace = self._traces[job]
        assert job.attempt is not None
        trace.number = job.attempt_number
        trace.leg.admitted_at = self._clock()
        trace.decode_worker = job.attempt.placement.decode.name

    def placed(self, job: Job, placement: Placement) -> None:
        leg = self._traces[job].leg
        assert job.attempt is not None
        leg.placement, leg.progress, leg.placed_at = placement, job.attempt.progress, self._clock()

    def sent(self, job: Job, choice: int, num_tokens: int, gap_s: float | None, now: float) -> None:
        trace = self._traces[job]
        if not trace.has_tokens:
            trace.has_tokens = True
            trace.span.set({"gen_ai.response.time_to_first_chunk": now - job.arrived_at})

    def retried(self, job: Job, failure: Failure) -> None:
        trace, now = self._traces[job], self._clock()
        self._end_leg(trace, now, failure.error.message)
        attributes = {
            "baton.attempt": trace.number,
            "baton.reason": failure.kind.value,
            "baton.message": failure.error.message,
        }
        trace.span.event(_EVENTS.get(failure.kind, _RETRY), now, attributes)
        trace.leg, trace.decode_worker = Leg(now), ""

    def finished(self, job: Job, timings: inference_pb2.StageTimings, now: float) -> None:
        trace = self._traces.pop(job)
        self._end_leg(trace, now)
        trace.span.set(_result_attributes(job))
        trace.span.end(now)

    def failed(self, job: Job | None, error: BatonError, now: float) -> None:
        # What is wrong with a request may quote it.
        problem = error.message if error.status in _OUR_FAULT else None
        if job is None:
            incoming = _incoming.get() or Incoming()
            span = self._start(incoming, now if incoming.arrived_s is None else incoming.arrived_s, {})
        else:
            trace = self._traces.pop(job)
            span = trace.span
            self._end_leg(trace, now, problem)
            span.set(_result_attributes(job))
        span.set({"error.type": error.status})
        span.end(now, error=problem)

    def _start(self, incoming: Incoming, start_s: float, attributes: Attributes) -> Span:
        common: Attributes = {
            "gen_ai.operation.name": incoming.operation,
            "gen_ai.provider.name": "baton",
            "gen_ai.request.model": self._model,
            "gen_ai.response.model": self._model,
        }
        return self._tracer.start(
            f"{incoming.operation} {self._model}",
            start_s=start_s,
            attributes={**common, **attributes},
            context=incoming.context,
        )

    def _end_leg(self, trace: _Trace, now: float, error: str | None = None) -> None:
        """Makes the spans of an attempt's stages; the last one is that in which it failed, if it did."""
        spans = list(trace.leg.spans(now))
        for span in spans:
            failed = error if span is spans[-1] else None
            trace.span.child(span.stage, span.start_s, span.end_s, _stage_attributes(trace, span.stage), error=failed)


def _request_attributes(job: Job) -> Attributes:
    sampling = job.prompt.sampling
    attributes: dict[str, AttributeValue] = {
        "gen_ai.response.id": job.request_id,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
        "baton.request_id": job.internal_id,
        "baton.priority": job.prompt.priority,
    }
    if sampling.top_k:
        attributes["gen_ai.request.top_k"] = sampling.top_k
    if sampling.n > 1:
        attributes["gen_ai.request.choice.count"] = sampling.n
    return attributes


def _result_attributes(job: Job) -> Attributes:
    reasons = [choice.finish_reason.name.lower() for choice in job.emission.choices]
    return {
        "gen_ai.usage.input_tokens": len(job.prompt.token_ids),
        "gen_ai.usage.output_tokens": job.emission.num_tokens,
        "gen_ai.usage.cache_read.input_tokens": job.cached_tokens or 0,
        "gen_ai.response.finish_reasons": [reason for reason in reasons if reason != FinishReason.NONE.name.lower()],
        "baton.attempts": job.attempt_number,
    }


def _stage_attributes(trace: _Trace, stage: str) -> Attributes:
    attributes: dict[str, AttributeValue] = {"baton.attempt": trace.number}
    leg = trace.leg
    if stage == "queue":
        return attributes
    worker = trace.decode_worker
    if stage == "prefill" and leg.placement is not None:
        attributes["baton.prefill.decision"] = leg.placement.decision.value
        if leg.placement.prefill is not None:
            worker = leg.placement.prefill.name
    if stage == "transfer" and leg.progress is not None and leg.progress.transport:
        attributes["baton.transfer.transport"] = leg.progress.transport
        attributes["baton.transfer.bytes"] = leg.progress.sent_bytes
    attributes["baton.worker"] = worker
    return attributes
