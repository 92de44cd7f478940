"""The decode engine loop: reserve, receive or prefill, fork the choices, decode, and give everything back.

    reserve -> RECEIVING --commit--> DECODING -> ENDED        (KV arrives from a prefill worker)
            -> PREFILLING ---------> DECODING -> ENDED        (this worker computes the prompt itself)

Everything here runs on the engine thread. Whatever way an attempt ends (done, cancelled, preempted, lease or deadline
over, a failed step), `_release` is the one exit: it frees the blocks, after a copy-in under way has let go of them.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence

from baton.config import DecodeConfig
from baton.errors import (
    BatonError,
    CancelledRequestError,
    DeadlineError,
    DuplicateRequestError,
    InternalError,
    UnavailableError,
)
from baton.internal.v1 import transfer_pb2, worker_pb2
from baton.metrics import SchedulerMetrics
from baton.requests import AttemptRef, FinishReason, Logprobs, RequestSpec, Token
from baton.wire import ref_to_wire
from decode_worker.admission import Admission, Refused
from decode_worker.batch import RunningBatch, Step
from decode_worker.choices import fork_choices
from decode_worker.outbox import Outbox
from decode_worker.report import StepReport
from decode_worker.request import DecodeRequest, Phase, TokenSequence
from decode_worker.tracing import DecodeTrace
from engine.engine import Engine
from engine.grammar import CompiledGrammar
from engine.prompt_logprobs import score_chunk
from engine.sampling import SampledTokens
from engine.sampling_state import SamplingState
from kvtransfer.leading_receiver import LeadingReceiver
from kvtransfer.lease import LeaseTable
from worker.attempts import Tombstones
from worker.deadlines import Deadlines
from worker.watch import WatchPublisher

logger = logging.getLogger(__name__)


class DecodeLoop:
    """Owns the requests of a decode worker. See the module for who may call what."""

    def __init__(
        self,
        engine: Engine,
        receiver: LeadingReceiver,
        outbox: Outbox,
        *,
        config: DecodeConfig,
        leases: LeaseTable,
        tombstones: Tombstones,
        watch: WatchPublisher,
        metrics: SchedulerMetrics,
        clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._cache = engine.cache
        self._receiver = receiver
        self._outbox = outbox
        self._config = config
        self._leases = leases
        self._tombstones = tombstones
        self._metrics = metrics
        self._clock = clock
        self._admission = Admission(engine, config)
        self._requests: dict[AttemptRef, DecodeRequest] = {}
        self._batch = RunningBatch(engine, self._requests, config, clock)
        # On a CPU a step is through once it is launched, and there is nothing to be gained.
        on_gpu = engine.model.device.type == "cuda"
        self._overlaps = on_gpu if config.async_scheduling == "auto" else config.async_scheduling == "on"
        # Ended while a copy-in was under way: their blocks wait for the receiver.
        self._letting_go: dict[AttemptRef, DecodeRequest] = {}
        self._num_arrived = 0
        # Launched, and not taken yet.
        self._in_flight: Step | None = None
        # What a step that fails was about.
        self._current: list[TokenSequence] = []
        self._deadlines = Deadlines(self._requests)
        self._counts_are_stale = True
        self._report = StepReport(outbox, watch, metrics, clock=clock)
        self._draining = False
        metrics.kv_blocks.set(self._cache.pool.num_usable)
        self._decoded_tokens = metrics.computed_tokens.labels(kind="decode")
        self._prefilled_tokens = metrics.computed_tokens.labels(kind="prefill")
        self._publish()

    # Commands

    def reserve(
        self,
        spec: RequestSpec,
        *,
        local_prefill: bool,
        grammar: CompiledGrammar | None = None,
        trace: DecodeTrace | None = None,
    ) -> worker_pb2.ReserveResponse:
        """Take all blocks that the request's prefix needs, or none; the attempt's end ends its `trace`.

        Args:
            grammar: the spec's, compiled.

        Raises:
            BatonError: the request was cancelled, runs already, or can never fit.
        """
        if self._tombstones.take(spec.ref):
            raise CancelledRequestError(f"request {spec.ref.request_id} was cancelled")
        if self._draining:
            raise UnavailableError("the decode worker is draining")
        for ref in [ref for ref in self._requests if ref.request_id == spec.ref.request_id]:
            if ref.attempt >= spec.ref.attempt:
                raise DuplicateRequestError(f"request {ref.request_id}: attempt {ref.attempt} is running")
            self.cancel(ref)
        self._num_arrived += 1
        admitted = self._admission.reserve(
            spec, self._requests.values(), arrival=self._num_arrived, local_prefill=local_prefill, grammar=grammar
        )
        if isinstance(admitted, Refused):
            self._metrics.refused.labels(admitted.reason).inc()
            return worker_pb2.ReserveResponse(
                refusal=worker_pb2.Refusal(
                    reason=admitted.reason, needed_blocks=admitted.needed_blocks, free_blocks=self._cache.num_free
                )
            )
        now = self._clock()
        shared = admitted.shared
        request = DecodeRequest(
            spec=spec,
            arrival=shared.arrival,
            phase=Phase.PREFILLING if local_prefill else Phase.RECEIVING,
            shared=shared,
            mailbox=self._outbox.open(spec),
            tails=admitted.tails,
            cached_tokens=admitted.cached_tokens,
            accepted_s=now,
            deadline_s=None if spec.timeout_s is None else now + spec.timeout_s,
            grammar=grammar,
            trace=trace,
        )
        self._requests[spec.ref] = request
        self._leases.grant(spec.ref)
        self._deadlines.add(request)
        self._changed()
        scored_here = local_prefill and spec.sampling.prompt_logprobs is not None
        if spec.ref.attempt == 1 and not scored_here:
            # Another attempt would find what an earlier one computed; a scored prompt is computed whole.
            self._metrics.prefix_queries.inc(len(shared.token_ids))
            self._metrics.prefix_hits.inc(admitted.cached_tokens)
        num_tokens, cached_tokens = len(shared.token_ids), admitted.cached_tokens
        if local_prefill:
            ticket = transfer_pb2.Ticket(ref=ref_to_wire(spec.ref), num_tokens=num_tokens, cached_tokens=cached_tokens)
        else:
            ticket = self._receiver.reserve(spec.ref, num_tokens, cached_tokens, admitted.lacking)
        self._publish()
        return worker_pb2.ReserveResponse(ticket=ticket)

    def commit(self, ref: AttemptRef, first_tokens: Sequence[transfer_pb2.FirstToken]) -> None:
        """All KV of the prefix has arrived and is verified: fork the choices and start decoding."""
        request = self._requests.get(ref)
        if request is None or request.phase is not Phase.RECEIVING:
            return
        assert request.shared is not None
        self._receiver.release(ref)
        request.shared.num_computed = len(request.shared.token_ids)
        try:
            self._fork(request, {first.choice: (first.token_id, first.finished) for first in first_tokens})
        except Exception as error:
            # Nobody else would end it: its lease goes on being renewed.
            logger.exception("the request could not be forked", extra={"request": request.name})
            self._end(request, InternalError(f"decode failed: {type(error).__name__}: {error}"))

    def transfer_aborted(self, ref: AttemptRef, reason: str) -> None:
        """The sender gave up, or bytes did not verify; the router hears of it from the prefill worker."""
        request = self._requests.get(ref)
        if request is not None and request.phase is Phase.RECEIVING:
            logger.info("transfer aborted: %s", reason, extra={"request": request.name})
            self._outbox.forget(ref)
            self._release(request)

    def released(self, ref: AttemptRef) -> None:
        """The receiver writes no more for `ref`."""
        if (request := self._letting_go.pop(ref, None)) is not None:
            self._free(request)

    def cancel(self, ref: AttemptRef) -> None:
        """End an attempt, or make sure that it never starts. Idempotent."""
        self._outbox.forget(ref)
        request = self._requests.get(ref)
        if request is None:
            self._tombstones.add(ref)
            self._leases.release(ref)
        else:
            self._metrics.cancelled.inc()
            self._release(request)
            self._leases.release(ref)

    def end_choice(self, ref: AttemptRef, choice: int) -> None:
        """The router wants nothing more of a choice: give its blocks back while the others go on. Idempotent."""
        request = self._requests.get(ref)
        if request is None:
            return
        request.ended_choices.add(choice)
        if (sequence := request.sequences.pop(choice, None)) is not None:
            self._batch.leave(sequence)
            self._changed()
            if not request.sequences:
                self._finish(request)

    def drain(self) -> None:
        """Reserve nothing more; what was accepted goes on."""
        self._draining = True
        self._publish()

    # The loop

    @property
    def is_idle(self) -> bool:
        """Whether no attempt holds anything."""
        return not self._requests and not self._letting_go and self._in_flight is None

    def next_wakeup_s(self) -> float | None:
        return self._deadlines.wait_s(self._clock(), self._leases.next_expiry_s)

    def step(self) -> bool:
        """Take every running sequence one token further. False when nothing could be computed.

        Where steps overlap, the next one is launched before the tokens of the last are looked at.
        """
        started_s = self._clock()
        self._sweep(started_s)
        plan = self._batch.plan()
        while plan.preempt is not None:
            if self._in_flight is not None:
                # It may end somebody.
                self._take_in_flight()
            else:
                self._preempt(self._requests[plan.preempt])
            plan = self._batch.plan()
        if plan.is_empty:
            was_in_flight = self._in_flight is not None
            self._take_in_flight()
            self._publish()
            return was_in_flight
        self._current = [*plan.decodes, *(chunk.sequence for chunk in plan.chunks)]
        step = self._batch.launch(plan)
        model_s = step.model_s + self._take_in_flight()
        self._in_flight = step
        if not self._overlaps or not step.can_be_followed:
            model_s += self._take_in_flight()
        self._current = []
        if plan.chunks:
            # Blocks that were owed are taken.
            self._counts_are_stale = True
        self._publish()
        num_prefilled = sum(chunk.num_tokens for chunk in plan.chunks)
        self._decoded_tokens.inc(len(plan.decodes))
        self._prefilled_tokens.inc(num_prefilled)
        self._metrics.step_tokens.observe(len(plan.decodes) + num_prefilled)
        step_s = self._clock() - started_s
        self._metrics.step_s.observe(step_s)
        self._metrics.step_overhead_s.observe(step_s - model_s)
        return True

    def fail(self, error: Exception) -> None:
        """A step raised: the requests that it was about end, everything else goes on."""
        self._metrics.step_failures.inc()
        launched, self._in_flight = self._in_flight, None
        sequences = self._current if launched is None else [*self._current, *launched.sequences]
        for ref in {sequence.ref for sequence in sequences}:
            if (request := self._requests.get(ref)) is not None:
                self._end(request, InternalError(f"decode failed: {type(error).__name__}: {error}"))
        self._current = []
        self._publish()

    def _sweep(self, now_s: float) -> None:
        for ref in self._leases.expired():
            self._metrics.lease_expiries.inc()
            self._outbox.forget(ref)
            if (request := self._requests.get(ref)) is not None:
                self._release(request)
        for request in self._deadlines.passed(now_s):
            self._end(request, DeadlineError("the deadline passed during decode"))

    def _changed(self) -> None:
        """Requests or sequences have come, gone or moved on."""
        self._counts_are_stale = True
        self._batch.changed()

    def _preempt(self, request: DecodeRequest) -> None:
        """Give the request's blocks back.

        The router starts it anew with its tokens forced: through a prefill worker where much is to be recomputed, else
        here; either way the blocks that stay cached are hits.
        """
        self._metrics.preemptions.inc()
        self._report.ended(request, worker_pb2.REQUEST_STATE_PREEMPTED)
        self._release(request)

    # What a step made

    def _take_in_flight(self) -> float:
        """Tell the tokens of the step that is in flight, if one is; returns the seconds that it was waited for."""
        if (step := self._in_flight) is None:
            return 0.0
        for request, start, logits in step.scored:
            if request.phase is Phase.PREFILLING:
                self._report.scored(request, score_chunk(request.spec, start, logits))
        started_s = self._clock()
        result = SampledTokens([], []) if step.drawn is None else step.drawn.read()
        waited_s = self._clock() - started_s
        self._batch.take(step, result.token_ids)
        sampled = zip(step.states, result.token_ids, result.logprobs, strict=True)
        for sequence in step.reached:
            tokens = list(itertools.islice(sampled, len(sequence.states)))
            if sequence.left:
                # It ended meanwhile.
                continue
            if sequence.lane is None:
                self._finish_prefill(self._requests[sequence.ref], tokens)
            else:
                self._advance(sequence, *tokens[0][1:])
        self._in_flight = None
        return waited_s

    def _finish_prefill(
        self, request: DecodeRequest, sampled: Sequence[tuple[SamplingState, int, Logprobs | None]]
    ) -> None:
        """A local prefill is through: send the first tokens and go on as after a commit."""
        request.prefill_s = self._clock() - request.accepted_s
        position = request.spec.first_position
        tokens = []
        for state, token_id, logprobs in sampled:
            state.append(token_id)
            if state.error is not None:
                self._end(request, state.error)
                return
            reason = state.finish_reason(token_id)
            self._report.token(request.mailbox.lanes[state.choice], position, token_id, logprobs, reason)
            tokens.append(Token(request.spec.ref, state.choice, position, token_id, logprobs, reason))
        self._fork(request, request.spec.first_outcomes(tokens))

    def _fork(self, request: DecodeRequest, firsts: dict[int, tuple[int, bool]]) -> None:
        """The shared prefix is computed: make a sequence for every choice that goes on."""
        shared = request.shared
        assert shared is not None
        self._cache.register(shared.blocks, shared.extend_hashes(self._engine.layout.block_size), shared.num_computed)
        request.phase = Phase.DECODING
        request.started_s = self._clock()
        self._changed()
        fork_choices(request, firsts, self._cache)
        if not request.sequences:
            self._finish(request)

    def _advance(self, sequence: TokenSequence, token_id: int, logprobs: Logprobs | None) -> None:
        """A choice has its next token."""
        request = self._requests[sequence.ref]
        position = sequence.num_generated
        reason = sequence.append(token_id)
        if (error := sequence.states[0].error) is not None:
            self._end(request, error)
            return
        if request.first_step_s is None:
            request.first_step_s = self._clock() - request.started_s
            self._report.decoding(request)
        self._report.token(request.mailbox.lanes[sequence.choice], position, token_id, logprobs, reason)
        if reason is not FinishReason.NONE:
            self.end_choice(sequence.ref, sequence.choice)

    # Ends

    def _finish(self, request: DecodeRequest) -> None:
        self._report.ended(request, worker_pb2.REQUEST_STATE_FINISHED)
        self._release(request)

    def _end(self, request: DecodeRequest, error: BatonError) -> None:
        """End an attempt with an error that its router hears of."""
        self._report.ended(request, worker_pb2.REQUEST_STATE_FAILED, error)
        self._release(request)

    def _release(self, request: DecodeRequest) -> None:
        """The one exit: the attempt's blocks are freed, once no copy-in writes them.

        The lease goes on covering what the router has not acknowledged.
        """
        ref = request.spec.ref
        receiving = request.phase is Phase.RECEIVING
        request.phase = Phase.ENDED
        if request.trace is not None:
            request.trace.released(
                cached_tokens=request.cached_tokens, started_s=request.started_s, first_step_s=request.first_step_s
            )
        del self._requests[ref]
        if receiving:
            self._letting_go[ref] = request
            self._receiver.release(ref)
        else:
            self._free(request)

    def _free(self, request: DecodeRequest) -> None:
        if request.shared is not None:
            self._batch.leave(request.shared)
            request.shared = None
        for sequence in request.sequences.values():
            self._batch.leave(sequence)
        request.sequences.clear()
        self._cache.free_tails(request.tails)
        request.tails = []
        self._changed()
        self._publish()

    def _publish(self) -> None:
        self._report.send()
        if self._counts_are_stale:
            self._counts_are_stale = False
            requests = self._requests.values()
            self._report.count(requests, self._admission.num_owed(requests))
        self._report.publish_load(self._cache, draining=self._draining)
