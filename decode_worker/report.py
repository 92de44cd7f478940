"""What one step has to say: tokens and updates to routers, load and cached blocks to all that watch.

Filled and published by the decode loop on the engine thread; one message a step to each router.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from baton.errors import BatonError
from baton.internal.v1 import worker_pb2
from baton.metrics import SchedulerMetrics
from baton.requests import AttemptRef, FinishReason, Logprobs, Token
from baton.wire import prompt_logprobs_to_wire, ref_to_wire, token_to_wire
from decode_worker.outbox import Outbox
from decode_worker.request import DecodeRequest, Phase
from engine.kv.cache import KVCache
from engine.prompt_logprobs import ScoredTokens
from worker.watch import Load, WatchPublisher


class StepReport:
    """Collects until `send`; nothing that a step produced is left behind in it."""

    def __init__(
        self,
        outbox: Outbox,
        watch: WatchPublisher,
        metrics: SchedulerMetrics,
        *,
        clock: Callable[[], float],
    ) -> None:
        self._outbox = outbox
        self._watch = watch
        self._metrics = metrics
        self._clock = clock
        self._tokens: list[tuple[AttemptRef, worker_pb2.TokenOut]] = []
        self._updates: list[tuple[AttemptRef, worker_pb2.RequestUpdate]] = []
        self._scores: list[tuple[AttemptRef, worker_pb2.PromptLogprobs]] = []

    def token(
        self,
        request: DecodeRequest,
        choice: int,
        position: int,
        token_id: int,
        logprobs: Logprobs | None,
        finish_reason: FinishReason,
    ) -> Token:
        """A choice of `request` has its token at `position`; returns it."""
        ref = request.spec.ref
        token = Token(ref, choice, position, token_id, logprobs, finish_reason)
        self._tokens.append((ref, token_to_wire(token)))
        return token

    def scored(self, request: DecodeRequest, scored: ScoredTokens) -> None:
        """The next tokens of the prompt of `request` have their logprobs."""
        ref, token_ids = request.spec.ref, request.spec.prompt_token_ids
        self._scores += [
            (ref, message) for message in prompt_logprobs_to_wire(ref, token_ids, scored.start, scored.logprobs)
        ]

    def decoding(self, request: DecodeRequest) -> None:
        """The request's first decode step ran."""
        self._update(request, worker_pb2.REQUEST_STATE_DECODING)

    def ended(
        self, request: DecodeRequest, state: worker_pb2.RequestState.ValueType, error: BatonError | None = None
    ) -> None:
        """Nothing more comes for `request`; sent at once, after its tokens."""
        if request.trace is not None:
            request.trace.ended(state, error)
        self._update(request, state, error)
        self.send()
        self._outbox.close(request.spec.ref)

    def send(self) -> None:
        """Hand everything collected to the outbox."""
        if self._tokens or self._updates or self._scores:
            tokens, self._tokens = self._tokens, []
            updates, self._updates = self._updates, []
            scores, self._scores = self._scores, []
            self._outbox.publish(tokens, updates, scores)

    def publish_load(
        self, requests: Collection[DecodeRequest], cache: KVCache, *, num_free: int, draining: bool
    ) -> None:
        """Tell watchers and metrics how things stand between two steps; `num_free` blocks may be given out."""
        stored, removed = cache.pool.take_events()
        decoding = sum(len(request.sequences) for request in requests)
        receiving = sum(request.phase is Phase.RECEIVING for request in requests)
        prefilling = sum(request.phase is Phase.PREFILLING for request in requests)
        self._metrics.running.set(decoding)
        self._metrics.waiting.labels("transfer").set(receiving)
        self._metrics.waiting.labels("local_prefill").set(prefilling)
        self._metrics.kv_usage.set(cache.usage)
        self._watch.update(
            Load(
                running=decoding,
                waiting=receiving + prefilling,
                free_blocks=num_free,
                total_blocks=cache.pool.num_usable,
                draining=draining,
            ),
            stored,
            removed,
        )

    def _update(
        self, request: DecodeRequest, state: worker_pb2.RequestState.ValueType, error: BatonError | None = None
    ) -> None:
        update = worker_pb2.RequestUpdate(ref=ref_to_wire(request.spec.ref), state=state)
        if error is not None:
            update.status, update.message = error.status, error.message
        if request.phase is Phase.DECODING:
            update.first_decode_step_s = request.first_step_s or 0.0
            update.local_prefill_s = request.prefill_s
            update.cached_tokens = request.cached_tokens
            update.decode_s = self._clock() - request.started_s
        self._updates.append((request.spec.ref, update))
