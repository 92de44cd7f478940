"""The spans of one attempt at a prefill worker: its wait, its computation and its push, told by its events."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from baton.errors import BatonError, CancelledRequestError
from baton.internal.v1 import worker_pb2
from baton.requests import RequestSpec
from baton.tracing import Attributes, Metadata

if TYPE_CHECKING:
    from baton.tracing.tracer import Tracer


class PrefillTrace:
    """Made by the service where tracing is on, and ended by it on every way out.

    Args:
        context: metadata of the router's call.
        clock: monotonic seconds.
    """

    def __init__(self, tracer: Tracer, context: Metadata, spec: RequestSpec, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._common: Attributes = {"baton.request_id": spec.ref.request_id, "baton.attempt": spec.ref.attempt}
        self._since_s = clock()
        attributes = {**self._common, "baton.prompt_tokens": len(spec.shared_token_ids)}
        self._span = tracer.start("prefill attempt", start_s=self._since_s, attributes=attributes, context=context)
        # The stage under way; empty when all are over.
        self._stage = "queue"
        self._error: str | None = None

    def saw(self, event: worker_pb2.PrefillEvent | BatonError) -> None:
        """An event is on its way to the router."""
        if isinstance(event, BatonError):
            self._span.set({"error.type": event.status})
            self._error = None if isinstance(event, CancelledRequestError) else event.message
            return
        match event.WhichOneof("event"):
            case "started":
                self._next("compute")
                self._span.set({"baton.cached_tokens": event.started.cached_tokens})
            case "first_tokens":
                self._next("push")
            case "done":
                done = event.done
                sent: Attributes = {"baton.transfer.bytes": done.bytes, "baton.transfer.transport": done.transport}
                self._next("", sent if done.committed else {})
                self._span.set({"baton.committed": done.committed})

    def end(self) -> None:
        """Nothing more comes."""
        if self._stage:
            self._next("", error=self._error)
        self._span.end(self._since_s, error=self._error)

    def _next(self, stage: str, attributes: Attributes | None = None, *, error: str | None = None) -> None:
        """The stage under way is over and another begins."""
        now = self._clock()
        self._span.child(self._stage, self._since_s, now, {**self._common, **(attributes or {})}, error=error)
        self._stage, self._since_s = stage, now
