"""The prefill engine loop: admit, compute chunks, push pages while later layers are computed, sample first tokens.

    submit -> waiting -> admitted (holds its blocks, push open) -> computed (first tokens sent) -> pushed -> freed

Everything here runs on the engine thread; `submit`, `cancel` and the push's end are posted to it. An attempt's blocks
are freed when no sender thread reads them any more, whichever way it ended.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence

import torch

from baton.config import PrefillConfig
from baton.errors import (
    BatonError,
    CancelledRequestError,
    DeadlineError,
    DuplicateRequestError,
    InternalError,
    InvalidRequestError,
    UnavailableError,
)
from baton.internal.v1 import transfer_pb2, worker_pb2
from baton.metrics import SchedulerMetrics
from baton.requests import AttemptRef, RequestSpec, Token
from baton.wire import token_to_wire
from engine.batch import BatchItem
from engine.engine import Engine
from engine.grammar import CompiledGrammar
from engine.kv.prefix_index import PrefixHit
from engine.prompt_logprobs import num_logits
from kvtransfer.leading_sender import LeadingSender
from kvtransfer.lease import LeaseTable
from prefill_worker import scheduler
from prefill_worker.first_tokens import sample_first_tokens
from prefill_worker.promises import Promises
from prefill_worker.request import EventSink, PrefillRequest
from prefill_worker.scheduler import Chunk, Prompt
from worker.attempts import Tombstones
from worker.deadlines import Deadlines
from worker.ranks.pages import PageRun, StepPages
from worker.watch import Load, WatchPublisher

logger = logging.getLogger(__name__)

# Logits of one step for scored prompts: at 128,000 tokens of vocabulary 256 positions.
_MAX_SCORED_BYTES = 128 << 20


class PrefillLoop:
    """Owns the requests of a prefill worker. See the module for who may call what."""

    def __init__(
        self,
        engine: Engine,
        sender: LeadingSender,
        *,
        config: PrefillConfig,
        leases: LeaseTable,
        tombstones: Tombstones,
        watch: WatchPublisher,
        metrics: SchedulerMetrics,
        post: Callable[[Callable[[], None]], None],
        clock: Callable[[], float],
        tell_ranks: Callable[[PageRun], None] = lambda _: None,
    ) -> None:
        """`tell_ranks` has the worker's other ranks send the pages of all layers, each of its own heads."""
        self._engine = engine
        self._cache = engine.cache
        self._layout = engine.layout
        self._sender = sender
        self._tell_ranks = tell_ranks
        self._config = config
        self._leases = leases
        self._tombstones = tombstones
        self._watch = watch
        self._metrics = metrics
        self._post = post
        self._clock = clock
        self._requests: dict[AttemptRef, PrefillRequest] = {}
        self._deadlines = Deadlines(self._requests)
        self._locations = [engine.layout.location(layer) for layer in range(engine.layout.num_layers)]
        self._promises = Promises(engine.layout.block_size)
        self._current: list[PrefillRequest] = []
        self._draining = False
        metrics.kv_blocks.set(self._cache.pool.num_usable)
        self._publish()

    # Commands

    def submit(
        self,
        spec: RequestSpec,
        ticket: transfer_pb2.Ticket,
        emit: EventSink,
        *,
        grammar: CompiledGrammar | None = None,
    ) -> None:
        """Take a prompt, with its grammar compiled; its events go to `emit`, on this thread."""
        if self._tombstones.take(spec.ref):
            emit(CancelledRequestError(f"request {spec.ref.request_id} was cancelled"))
            return
        if spec.ref in self._requests:
            emit(DuplicateRequestError(f"{spec.ref} is running"))
            return
        if self._draining:
            emit(UnavailableError("the prefill worker is draining"))
            return
        token_ids = spec.shared_token_ids
        if len(token_ids) > self._engine.max_sequence_tokens:
            limit = self._engine.max_sequence_tokens
            emit(InvalidRequestError("prompt", f"{len(token_ids)} tokens do not fit the prefill worker's {limit}"))
            return
        now = self._clock()
        request = PrefillRequest(
            spec=spec,
            ticket=ticket,
            emit=emit,
            token_ids=token_ids,
            block_hashes=self._engine.prefix_hashes(spec),
            prompt=Prompt(
                spec.ref,
                spec.priority,
                now,
                num_tokens=len(token_ids),
                scored=spec.sampling.prompt_logprobs is not None,
            ),
            deadline_s=None if spec.timeout_s is None else now + spec.timeout_s,
            grammar=grammar,
        )
        self._requests[spec.ref] = request
        self._deadlines.add(request)
        self._leases.grant(spec.ref)
        self._sender.warm(ticket)

    def cancel(self, ref: AttemptRef) -> None:
        """End an attempt, or make sure that it never starts. Idempotent."""
        request = self._requests.get(ref)
        if request is None:
            self._tombstones.add(ref)
        elif not request.ended:
            self._metrics.cancelled.inc()
            self._drop(request, CancelledRequestError(f"request {ref.request_id} was cancelled"))

    def drain(self) -> None:
        """Take nothing more; what was accepted goes on."""
        self._draining = True
        self._publish()

    # The loop

    @property
    def requests(self) -> Collection[PrefillRequest]:
        """All attempts that hold something."""
        return self._requests.values()

    @property
    def is_idle(self) -> bool:
        """Whether no attempt holds anything."""
        return not self._requests

    def next_wakeup_s(self) -> float | None:
        return self._deadlines.wait_s(self._clock(), self._leases.next_expiry_s)

    def step(self) -> bool:
        """Admit, compute one batch and send what it made. False when there was nothing to compute."""
        started_s = self._clock()
        self._sweep(started_s)
        ordered = scheduler.in_order(
            (r.prompt for r in self._requests.values() if not r.ended and r.prompt.num_remaining),
            now_s=started_s,
            ageing_s=self._config.ageing_s,
        )
        self._admit(ordered)
        chunks = scheduler.plan_chunks(
            ordered,
            max_tokens=self._config.max_batch_tokens,
            max_requests=self._config.max_batch_requests,
            max_scored_tokens=max(1, _MAX_SCORED_BYTES // (4 * self._engine.model.vocab_size)),
        )
        if chunks:
            self._current = [self._requests[chunk.prompt.ref] for chunk in chunks]
            model_s = self._compute(chunks)
            self._current = []
            num_tokens = sum(chunk.num_tokens for chunk in chunks)
            step_s = self._clock() - started_s
            self._metrics.step_s.observe(step_s)
            self._metrics.step_overhead_s.observe(step_s - model_s)
            self._metrics.step_tokens.observe(num_tokens)
            self._metrics.computed_tokens.labels(kind="prefill").inc(num_tokens)
        self._publish()
        return bool(chunks)

    def fail(self, error: Exception) -> None:
        """A step raised: its prompts end, everything else goes on."""
        self._metrics.step_failures.inc()
        for request in self._current:
            self._drop(request, InternalError(f"prefill failed: {type(error).__name__}: {error}"))
        self._current = []

    def _sweep(self, now_s: float) -> None:
        for ref in self._leases.expired():
            self._metrics.lease_expiries.inc()
            if (request := self._requests.get(ref)) is not None:
                self._drop(request, UnavailableError("the lease ran out: the router did not renew it"))
        for request in self._deadlines.passed(now_s):
            if not request.ended:
                self._drop(request, DeadlineError("the deadline passed during prefill"))

    # Admission

    def _admit(self, ordered: Sequence[Prompt]) -> None:
        admitted = scheduler.admit(
            ordered,
            free_blocks=self._cache.num_free - self._num_owed(),
            max_requests=self._config.max_batch_requests,
            blocks_needed=self._blocks_needed,
        )
        for prompt in admitted:
            if not self._begin(self._requests[prompt.ref]):
                break

    def _blocks_needed(self, prompt: Prompt) -> int | None:
        request = self._requests[prompt.ref]
        hit = self._match(request)
        if self._waits_for_another(request, hit):
            return None
        return self._cache.blocks_needed(prompt.num_tokens, hit, chunk_tokens=self._config.max_batch_tokens)

    def _begin(self, request: PrefillRequest) -> bool:
        """Take the request's blocks and open its push; False where an earlier admission evicted what it counted on."""
        prompt = request.prompt
        hit = self._match(request)
        needed = self._cache.blocks_needed(prompt.num_tokens, hit, chunk_tokens=self._config.max_batch_tokens)
        if needed > self._cache.num_free - self._num_owed() or self._waits_for_another(request, hit):
            return False
        try:
            request.push = self._sender.open(
                request.ticket, lambda _push, error: self._post(lambda: self._pushed(request, error))
            )
        except BatonError as error:
            request.end(error)
            self._forget(request)
            return True
        request.blocks = self._cache.begin(hit)
        prompt.num_computed = hit.num_tokens
        prompt.admitted = True
        self._promises.make(prompt, request.block_hashes)
        self._metrics.queue_s.observe(self._clock() - prompt.arrived_s)
        if request.spec.ref.attempt == 1 and not prompt.scored:
            # Another attempt would find what an earlier one computed; a scored prompt asks for nothing.
            self._metrics.prefix_queries.inc(prompt.num_tokens)
            self._metrics.prefix_hits.inc(hit.num_tokens)
        request.emit(worker_pb2.PrefillEvent(started=worker_pb2.PrefillStarted(cached_tokens=hit.num_tokens)))
        if num_cached := hit.num_tokens // self._layout.block_size:
            run = _page_run(request, 0, num_cached)
            run.send(self._locations)
            self._tell_ranks(run)
        return True

    def _match(self, request: PrefillRequest) -> PrefixHit:
        """What need not be computed: a scored prompt is computed whole."""
        return self._cache.match(request.block_hashes, 0 if request.prompt.scored else request.prompt.num_tokens - 1)

    def _waits_for_another(self, request: PrefillRequest, hit: PrefixHit) -> bool:
        return not request.prompt.scored and self._promises.is_next_promised(request.block_hashes, hit.num_tokens)

    def _num_owed(self) -> int:
        """Blocks that admitted prompts were promised and have not taken yet."""
        return sum(
            self._cache.blocks_to_come(
                request.blocks, request.prompt.num_tokens, chunk_tokens=self._config.max_batch_tokens
            )
            for request in self._requests.values()
            if request.blocks is not None and not request.ended
        )

    # Computing

    def _compute(self, chunks: Sequence[Chunk]) -> float:
        """Compute chunks and send what they complete; returns the seconds in the model, layers' pushes included."""
        items: list[BatchItem] = []
        for chunk, request in zip(chunks, self._current, strict=True):
            assert request.blocks is not None
            start, end = chunk.prompt.num_computed, chunk.prompt.num_computed + chunk.num_tokens
            # Admission counted these blocks, so they are there.
            allocated = self._cache.allocate(request.blocks, end)
            assert allocated, "an admitted prompt found no block"
            items.append(
                BatchItem(
                    token_ids=request.token_ids[start:end],
                    start=start,
                    tables=request.blocks.rows(),
                    num_logits=num_logits(request.spec, start, end),
                )
            )
        started_s = self._clock()
        logits = self._engine.runner.execute(items, on_layer=self._step_pages(chunks))
        model_s = self._clock() - started_s
        finishing: list[PrefillRequest] = []
        last_rows: list[int] = []
        num_rows = 0
        for chunk, request, item in zip(chunks, self._current, items, strict=True):
            assert request.blocks is not None
            num_rows += item.num_logits
            if chunk.prompt.scored:
                request.score(item.start, logits[num_rows - item.num_logits : num_rows])
            self._promises.settle(chunk.prompt, request.block_hashes, chunk.num_tokens)
            chunk.prompt.num_computed += chunk.num_tokens
            self._cache.register(request.blocks, request.block_hashes, chunk.prompt.num_computed)
            self._cache.free_out_of_window(request.blocks, chunk.prompt.num_computed)
            if not chunk.prompt.num_remaining:
                finishing.append(request)
                last_rows.append(num_rows - 1)
        if finishing:
            self._finish(finishing, logits[last_rows])
        return model_s

    def _finish(self, finishing: Sequence[PrefillRequest], logits: torch.Tensor) -> None:
        for request, first in zip(finishing, sample_first_tokens(finishing, logits), strict=True):
            if isinstance(first, BatonError):
                self._drop(request, first)
            else:
                self._first_tokens(request, first)

    def _step_pages(self, chunks: Sequence[Chunk]) -> StepPages:
        """What to push as soon as a layer's KV of this step is final: its whole blocks, and the partial last block of a
        prompt that ends here."""
        runs = []
        for chunk, request in zip(chunks, self._current, strict=True):
            start, end = chunk.prompt.num_computed, chunk.prompt.num_computed + chunk.num_tokens
            last = self._layout.num_blocks(end) if end == chunk.prompt.num_tokens else end // self._layout.block_size
            if (first := start // self._layout.block_size) < last:
                runs.append(_page_run(request, first, last))
        return StepPages(runs, self._locations)

    def _first_tokens(self, request: PrefillRequest, tokens: Sequence[Token]) -> None:
        """Tell the router, and commit the push."""
        request.computed_s = self._clock()
        request.emit(
            worker_pb2.PrefillEvent(
                first_tokens=worker_pb2.PrefillFirstTokens(
                    tokens=[token_to_wire(token) for token in tokens],
                    prefill_s=request.computed_s - request.prompt.arrived_s,
                )
            )
        )
        firsts = request.spec.first_outcomes(tokens)
        assert request.push is not None
        if all(finished for _, finished in firsts.values()):
            request.push.abort("every choice ended with its first token")
            request.end(worker_pb2.PrefillEvent(done=worker_pb2.PrefillDone(committed=False)))
        else:
            request.push.commit(
                [
                    transfer_pb2.FirstToken(choice=choice, token_id=token_id, finished=finished)
                    for choice, (token_id, finished) in sorted(firsts.items())
                ]
            )

    # Ends

    def _pushed(self, request: PrefillRequest, error: BatonError | None) -> None:
        """No thread reads the request's blocks any more."""
        assert request.push is not None
        if error is not None:
            request.end(error)
        else:
            request.end(
                worker_pb2.PrefillEvent(
                    done=worker_pb2.PrefillDone(
                        committed=True,
                        transfer_s=self._clock() - request.computed_s,
                        bytes=request.push.bytes_sent,
                        transport=request.push.transport,
                        sending_s=request.push.sending_s,
                    )
                )
            )
        self._forget(request)

    def _drop(self, request: PrefillRequest, error: BatonError) -> None:
        """End an attempt early; its blocks follow once its push lets go of them."""
        request.end(error)
        if request.push is None:
            self._forget(request)
        else:
            request.push.abort(error.message)

    def _forget(self, request: PrefillRequest) -> None:
        del self._requests[request.spec.ref]
        self._leases.release(request.spec.ref)
        if request.blocks is not None:
            self._promises.settle(request.prompt, request.block_hashes, request.prompt.num_remaining)
            self._cache.free(request.blocks)
            request.blocks = None

    def _publish(self) -> None:
        prompts = [request.prompt for request in self._requests.values() if not request.ended]
        running = sum(prompt.admitted for prompt in prompts)
        queued_tokens = sum(prompt.num_remaining for prompt in prompts)
        stored, removed = self._cache.pool.take_events()
        self._metrics.running.set(running)
        self._metrics.waiting.labels("queue").set(len(prompts) - running)
        self._metrics.queued_tokens.set(queued_tokens)
        self._metrics.kv_usage.set(self._cache.usage)
        self._watch.update(
            Load(
                running=running,
                waiting=len(prompts) - running,
                free_blocks=self._cache.num_free,
                total_blocks=self._cache.pool.num_usable,
                queued_tokens=queued_tokens,
                token_credit=self._config.token_credit,
                draining=self._draining,
            ),
            stored,
            removed,
        )


def _page_run(request: PrefillRequest, first: int, last: int) -> PageRun:
    """The request's logical blocks [first, last), to be pushed; the sender drops what nobody wants."""
    assert request.push is not None
    assert request.blocks is not None
    blocks = [row[first:last].tolist() for row in request.blocks.rows()]
    return PageRun(request.push, request.push.number, first, blocks)
