"""What one step has to say: tokens and updates to routers, load and cached blocks to all that watch.

Filled and published by the decode loop on the engine thread; one message a step to each router.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection

from baton.errors import BatonError
from baton.internal.v1 import worker_pb2
from baton.metrics import SchedulerMetrics
from baton.requests import FinishReason, Logprobs
from baton.wire import prompt_logprobs_to_wire, ref_to_wire, token_of_choice
from decode_worker.outbox import Lane, Mailbox, Outbox
from decode_worker.request import DecodeRequest, Phase
from engine.kv.cache import KVCache
from engine.prompt_logprobs import ScoredTokens
from worker.watch import Load, WatchPublisher


@dataclasses.dataclass(frozen=True, slots=True)
class _Counts:
    """Sequences that decode, requests that do not yet, prompt tokens that are to be computed for these here, and free
    blocks that they were promised."""

    decoding: int = 0
    receiving: int = 0
    prefilling: int = 0
    queued_tokens: int = 0
    owed_blocks: int = 0


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
        self._tokens: list[tuple[Lane, worker_pb2.TokenOut]] = []
        self._updates: list[tuple[Mailbox, worker_pb2.RequestUpdate]] = []
        self._scores: list[tuple[Mailbox, worker_pb2.PromptLogprobs]] = []
        self._counts = _Counts()
        self._load = Load()
        self._num_free = -1
        self._running = metrics.running
        self._receiving = metrics.waiting.labels("transfer")
        self._prefilling = metrics.waiting.labels("local_prefill")

    def token(
        self, lane: Lane, position: int, token_id: int, logprobs: Logprobs | None, finish_reason: FinishReason
    ) -> None:
        """The choice of `lane` has its token at `position`."""
        self._tokens.append((lane, token_of_choice(lane.template, position, token_id, logprobs, finish_reason)))

    def scored(self, request: DecodeRequest, scored: ScoredTokens) -> None:
        """The next tokens of the prompt of `request` have their logprobs."""
        ref, token_ids = request.spec.ref, request.spec.prompt_token_ids
        self._scores += [
            (request.mailbox, message)
            for message in prompt_logprobs_to_wire(ref, token_ids, scored.start, scored.logprobs)
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
        self._outbox.complete(request.spec.ref)

    def send(self) -> None:
        """Hand everything collected to the outbox."""
        if self._tokens or self._updates or self._scores:
            tokens, self._tokens = self._tokens, []
            updates, self._updates = self._updates, []
            scores, self._scores = self._scores, []
            self._outbox.publish(tokens, updates, scores)

    def count(self, requests: Collection[DecodeRequest], num_owed: int) -> None:
        """Requests have come, gone or moved on, and `num_owed` free blocks are promised to them."""
        prefilling = [
            sequence.num_remaining
            for request in requests
            if request.phase is Phase.PREFILLING
            for sequence in request.runnable
        ]
        self._counts = _Counts(
            decoding=sum(len(request.sequences) for request in requests),
            receiving=sum(request.phase is Phase.RECEIVING for request in requests),
            prefilling=len(prefilling),
            queued_tokens=sum(prefilling),
            owed_blocks=num_owed,
        )
        self._running.set(self._counts.decoding)
        self._receiving.set(self._counts.receiving)
        self._prefilling.set(self._counts.prefilling)
        self._metrics.queued_tokens.set(self._counts.queued_tokens)

    def publish_load(self, cache: KVCache, *, draining: bool) -> None:
        """Tell watchers and metrics how things stand between two steps, if anything changed."""
        stored, removed = cache.pool.take_events()
        counts, num_free = self._counts, cache.num_free
        if num_free != self._num_free:
            self._num_free = num_free
            self._metrics.kv_usage.set(cache.usage)
        load = Load(
            running=counts.decoding,
            waiting=counts.receiving + counts.prefilling,
            free_blocks=max(0, num_free - counts.owed_blocks),
            total_blocks=cache.pool.num_usable,
            queued_tokens=counts.queued_tokens,
            draining=draining,
        )
        if load != self._load or stored or removed:
            self._load = load
            self._watch.update(load, stored, removed)

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
        self._updates.append((request.mailbox, update))
