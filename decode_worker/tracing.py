"""The spans of one attempt at a decode worker: what comes before its first step, and its decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from baton.errors import BatonError, CancelledRequestError
from baton.internal.v1 import worker_pb2
from baton.requests import RequestSpec
from baton.tracing import Attributes, Metadata, trace_id

if TYPE_CHECKING:
    from baton.tracing.tracer import Tracer

_OUTCOMES = {
    worker_pb2.REQUEST_STATE_FINISHED: "finished",
    worker_pb2.REQUEST_STATE_PREEMPTED: "preempted",
    worker_pb2.REQUEST_STATE_FAILED: "failed",
}


class DecodeTrace:
    """Made by the service where tracing is on; ended by whatever ends the attempt, on the engine thread.

    Args:
        context: metadata of the router's call.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        tracer: Tracer,
        context: Metadata,
        spec: RequestSpec,
        *,
        local_prefill: bool,
        clock: Callable[[], float],
    ) -> None:
        self._clock = clock
        self._first_stage = "prefill" if local_prefill else "receive"
        self._common: Attributes = {"baton.request_id": spec.ref.request_id, "baton.attempt": spec.ref.attempt}
        self._accepted_s = clock()
        attributes = {**self._common, "baton.prompt_tokens": len(spec.shared_token_ids)}
        self._span = tracer.start("decode attempt", start_s=self._accepted_s, attributes=attributes, context=context)
        self._outcome = "released"
        self._error: str | None = None

    @property
    def trace_id(self) -> str:
        """In hexadecimal."""
        return trace_id(self._span.context)

    def refused(self, reason: str) -> None:
        """Nothing was reserved; the router will ask again."""
        self._span.set({"baton.outcome": "refused", "baton.reason": reason})
        self._span.end(self._clock())

    def rejected(self, error: BatonError) -> None:
        """Nothing was reserved, and nothing will be."""
        self._note(error)
        self._span.end(self._clock(), error=self._error)

    def ended(self, state: worker_pb2.RequestState.ValueType, error: BatonError | None) -> None:
        """The router is told how the attempt ended."""
        self._outcome = _OUTCOMES[state]
        if error is not None:
            self._note(error)

    def released(self, *, cached_tokens: int, started_s: float, first_step_s: float | None) -> None:
        """The attempt gives its blocks back.

        Args:
            started_s: when it began to decode, in monotonic seconds; 0 where it never did.
            first_step_s: how long the first step then took; None where there was none.
        """
        now = self._clock()
        has_started = started_s > 0
        self._span.child(
            self._first_stage,
            self._accepted_s,
            started_s if has_started else now,
            self._common,
            error=None if has_started else self._error,
        )
        if has_started:
            self._span.child("decode", started_s, now, self._common, error=self._error)
        if first_step_s is not None:
            self._span.event("first decode step", started_s + first_step_s, {})
        self._span.set({"baton.outcome": self._outcome, "baton.cached_tokens": cached_tokens})
        self._span.end(now, error=self._error)

    def _note(self, error: BatonError) -> None:
        self._span.set({"error.type": error.status})
        self._error = None if isinstance(error, CancelledRequestError) else error.message
