"""A request's life, from acceptance to its last message.

    1. accept     check the request, tokenise it, hash its blocks                                    intake
    2. queue      wait until a decode worker has room and a prefill worker has credit                admission
    3. place      choose both from one snapshot                                                      placement
    4. reserve    the decode worker takes all blocks at once, or refuses: back to 2                  worker_link
    5. prefill    the prefill worker computes and sends the KV, or the decode worker does it itself  worker_link
    6. decode     tokens of both come in, ordered by (choice, position)                              request_state
    7. stream     text, stop strings; tokens are acknowledged as the client takes them               emission
    8. finish     usage and timings; whatever is still held is released
       recover    a worker died, was full or preempted: back to 2 with what was delivered            recovery

Each request runs in the task of whoever calls `generate`; a remote prefill adds one task while it lasts. Steps 7 and 8
run in whoever reads the worker's stream: the request's own task sleeps from its prefill to its end, or to a recovery.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import functools
import uuid
from collections.abc import Callable, Sequence
from typing import Protocol

from baton import logs
from baton.errors import (
    BatonError,
    CancelledRequestError,
    DeadlineError,
    DuplicateRequestError,
    InternalError,
    UnavailableError,
)
from baton.internal.v1 import transfer_pb2, worker_pb2
from baton.tracing import Metadata
from baton.v1 import inference_pb2
from baton.wire import ref_to_wire, spec_to_wire
from router.admission import AdmissionQueue
from router.attach import AttachStream
from router.detokenization import Detokenizer
from router.emission import Emission
from router.intake import Intake
from router.job import Job
from router.membership import Membership
from router.observation import Observer
from router.recovery import Action, Failure, FailureKind, counts_as_retry, decide, exhausted
from router.request_state import Attempt
from router.sink import Sink
from router.validation import check_request_id


class MakeDetokenizer(Protocol):
    """Makes what turns the tokens after `context` into text."""

    def __call__(self, context: Sequence[int], *, skip_special_tokens: bool) -> Detokenizer: ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PipelineOptions:
    router_id: str
    max_retries: int
    max_unacked_tokens: int


class Pipeline:
    """Serves requests; shared by all APIs. Belongs to the router's event loop.

    Args:
        detokenizer: makes one for each choice of a request.
        clock: monotonic seconds, as the event loop counts them but not rounded to its ticks.
    """

    def __init__(
        self,
        *,
        intake: Intake,
        queue: AdmissionQueue,
        membership: Membership,
        observer: Observer,
        detokenizer: MakeDetokenizer,
        options: PipelineOptions,
        clock: Callable[[], float],
    ) -> None:
        self._intake = intake
        self._queue = queue
        self._membership = membership
        self._observer = observer
        self._detokenizer = detokenizer
        self._options = options
        self._clock = clock
        self._running: set[str] = set()
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_running(self) -> int:
        """Requests under way, queued ones included."""
        return len(self._running)

    @property
    def num_queued(self) -> int:
        """Requests that wait for workers."""
        return len(self._queue)

    async def drain(self) -> None:
        """Takes no more requests; returns when the last one has ended."""
        self._draining = True
        await self._idle.wait()

    async def generate(
        self, request: inference_pb2.GenerateRequest, sink: Sink, timeout_s: float | None = None
    ) -> None:
        """Sends the responses of one request, to the last. Cancelling the task releases all that the request holds.

        Raises:
            BatonError: whatever refused the request or ended it early.
        """
        deadline = None if timeout_s is None else self._clock() + timeout_s
        request_id = self._register(request.request_id)
        logs.about(request_id)
        job: Job | None = None
        try:
            async with asyncio.timeout_at(deadline):
                job = await self._accept(request_id, request, deadline)
            if job.prompt.needs_workers:
                await self._run(job, sink)
            else:
                sink.send(self._respond_alone(job))
            await sink.drain()
        except BaseException as error:
            cause = _as_baton_error(error)
            if job is None or not job.is_over:
                self._observer.failed(job, cause, self._clock())
            if isinstance(error, TimeoutError):
                raise cause from None
            raise
        finally:
            self._unregister(request_id)

    def _register(self, wanted_id: str) -> str:
        try:
            if self._draining:
                raise UnavailableError("the router is draining")
            check_request_id(wanted_id)
            if wanted_id in self._running:
                raise DuplicateRequestError(f"request_id: a request {wanted_id!r} is running")
        except BatonError as error:
            self._observer.failed(None, error, self._clock())
            raise
        request_id = wanted_id or uuid.uuid4().hex
        self._running.add(request_id)
        self._idle.clear()
        return request_id

    def _unregister(self, request_id: str) -> None:
        self._running.discard(request_id)
        if not self._running:
            self._idle.set()

    async def _accept(self, request_id: str, request: inference_pb2.GenerateRequest, deadline: float | None) -> Job:
        """Step 1."""
        arrived_at = self._clock()
        prompt = await self._intake.accept(request)
        job = Job(
            request_id=request_id,
            prompt=prompt,
            emission=Emission(
                prompt.sampling,
                prompt.stops,
                functools.partial(self._detokenizer, prompt.token_ids, skip_special_tokens=prompt.skip_special_tokens),
                include_stop=prompt.include_stop,
            ),
            entry=self._queue.enter(prompt.demand(), prompt.priority),
            arrived_at=arrived_at,
            deadline=deadline,
        )
        self._observer.accepted(job)
        logs.about(job.name)
        return job

    async def _run(self, job: Job, sink: Sink) -> None:
        """Steps 2 to 8, with as many attempts as it takes; TimeoutError after the deadline."""
        try:
            while not job.is_over:
                async with asyncio.timeout_at(job.deadline):
                    attempt = await self._begin_attempt(job)
                if job.deadline is not None:
                    job.expiry = asyncio.get_running_loop().call_at(job.deadline, attempt.expire)
                link = self._membership.decode_link(attempt.placement.decode)
                attach = None if link is None else link.attach
                await attempt.deliver(sink, functools.partial(self._deliver, job, attempt, attach, sink))
                if not job.is_over:
                    assert attempt.failure is not None
                    self._recover(job, attempt, attempt.failure)
        finally:
            self._end_attempt(job)

    async def _begin_attempt(self, job: Job) -> Attempt:
        """Steps 2 to 5; what goes wrong from the reservation on is the attempt's failure."""
        charge = await self._queue.admit(job.entry)
        granted_at = self._clock()
        attempt = Attempt(ref_to_wire(job.ref), charge, [len(choice.token_ids) for choice in job.emission.choices])
        attempt.progress.queue_s = granted_at - job.entry.waiting_since
        job.attempt = attempt
        self._observer.admitted(job)
        spec = spec_to_wire(
            job.spec(
                router_id=self._options.router_id,
                max_unacked_tokens=self._options.max_unacked_tokens,
                now=granted_at,
            )
        )
        try:
            ticket = await self._reserve(attempt, spec, job.trace_context)
            attempt.progress.reserve_s = self._clock() - granted_at
            attempt.progress.decode_cached_tokens = ticket.cached_tokens
            if attempt.failure is None:
                self._observer.placed(job, attempt.placement)
                request = worker_pb2.PrefillRequest(spec=spec, ticket=ticket)
                self._start_prefill(attempt, request, job.trace_context)
        except BatonError as error:
            attempt.fail(Failure(FailureKind.RESERVE_FAILED, error, attempt.placement.decode))
        return attempt

    async def _reserve(self, attempt: Attempt, spec: worker_pb2.RequestSpec, metadata: Metadata) -> transfer_pb2.Ticket:
        """Step 4. A refusal is noted as the attempt's failure."""
        key = attempt.placement.decode
        link = self._membership.decode_link(key)
        if link is None:
            raise UnavailableError(f"{key.name} is gone")
        link.attach.add(attempt)
        request = worker_pb2.ReserveRequest(spec=spec, local_prefill=attempt.placement.prefill is None)
        response = await link.reserve(request, metadata)
        if response.WhichOneof("outcome") == "refusal":
            attempt.fail(Failure(FailureKind.REFUSED, UnavailableError(response.refusal.reason), key))
        else:
            attempt.reserved = True
            self._queue.reserved(attempt.charge)
            self._observer.reserved()
        return response.ticket

    def _start_prefill(self, attempt: Attempt, request: worker_pb2.PrefillRequest, metadata: Metadata) -> None:
        """Step 5; nothing to do where the decode worker prefills."""
        key = attempt.placement.prefill
        if key is None:
            return
        link = self._membership.prefill_link(key)
        if link is None:
            attempt.prefill_failed(UnavailableError(f"{key.name} is gone"), key)
        else:
            link.start(request, attempt, metadata)

    def _deliver(
        self,
        job: Job,
        attempt: Attempt,
        attach: AttachStream | None,
        sink: Sink,
        tokens: Sequence[worker_pb2.TokenOut],
    ) -> bool:
        """Steps 7 and 8, for tokens as they come; whether they were the last."""
        now, token = self._clock(), tokens[0]
        index = token.choice
        choice = job.emission.choices[index]
        if attempt.delivers and len(tokens) == 1 and (text := choice.take_plain(token)) is not None:
            sink.send_token(job.request_id, index, text, choice.token_ids[-1])
            self._observer.sent(job, index, 1, job.note_sent(index, 1, now), now)
            if attach is not None:
                attach.acknowledge(attempt, index, len(choice.token_ids))
            return False
        attempt.delivers = True
        sink.send(self._respond(job, attempt, tokens, now))
        if attach is not None and job.prompt.generates:
            _acknowledge(job, attempt, attach, tokens)
        return job.is_over

    def _respond(
        self, job: Job, attempt: Attempt, tokens: Sequence[worker_pb2.TokenOut], now: float
    ) -> inference_pb2.GenerateResponse:
        """The next message, and with the last token what ends the stream."""
        emission = job.emission
        is_first = not emission.num_tokens
        if attempt.charge.prefill_tokens:
            self._queue.prefilled(attempt.charge)
        job.note_cached(attempt.progress.cached_tokens)
        response = inference_pb2.GenerateResponse(request_id=job.request_id)
        if job.prompt.generates:
            deltas = emission.take(tokens, response.choices.add)
            for choice, num_tokens in collections.Counter(delta.index for delta in deltas).items():
                self._observer.sent(job, choice, num_tokens, job.note_sent(choice, num_tokens, now), now)
        else:
            response.choices.extend(emission.end())
        if is_first and job.prompt.echo is not None:
            response.prompt.CopyFrom(job.prompt.echo)
            response.prompt.logprobs.extend(attempt.prompt_logprobs)
        if emission.finished:
            response.usage.CopyFrom(job.usage())
            response.timings.CopyFrom(job.timings(attempt, now))
            self._finish(job, response, now)
        return response

    def _respond_alone(self, job: Job) -> inference_pb2.GenerateResponse:
        """The only message of a request that no worker sees: it asks for no token, and for its prompt back."""
        response = inference_pb2.GenerateResponse(
            request_id=job.request_id,
            choices=job.emission.end(),
            prompt=job.prompt.echo,
            usage=job.usage(),
            timings=inference_pb2.StageTimings(),
        )
        self._finish(job, response, self._clock())
        return response

    def _finish(self, job: Job, response: inference_pb2.GenerateResponse, now: float) -> None:
        """The last message is made."""
        job.is_over = True
        self._observer.finished(job, response.timings, now)

    def _recover(self, job: Job, attempt: Attempt, failure: Failure) -> None:
        """Prepares the next attempt, or raises what the client is told."""
        action = decide(failure, committed=attempt.committed)
        self._end_attempt(job)
        if action is Action.FAIL:
            raise failure.error
        if action is Action.RETRY:
            job.num_retries += counts_as_retry(failure)
            if job.num_retries > self._options.max_retries:
                raise exhausted(failure, self._options.max_retries)
            job.attempt_number += 1
        self._observer.retried(job, failure)
        self._queue.put_back(job.entry, job.demand(), avoid=failure.worker)

    def _end_attempt(self, job: Job) -> None:
        """Releases what the current attempt holds, on every way out. Never waits."""
        attempt, job.attempt = job.attempt, None
        if attempt is None:
            return
        if job.expiry is not None:
            job.expiry.cancel()
        decode = self._membership.decode_link(attempt.placement.decode)
        prefill = self._membership.prefill_link(attempt.placement.prefill) if attempt.placement.prefill else None
        if decode is not None:
            decode.attach.remove(attempt)
        if not _is_over_at_workers(job, attempt):
            if decode is not None:
                decode.cancel(attempt.ref)
            if prefill is not None:
                prefill.cancel(attempt)
        self._queue.release(attempt.charge)
        if attempt.reserved:
            self._observer.released()


def _acknowledge(job: Job, attempt: Attempt, attach: AttachStream, tokens: Sequence[worker_pb2.TokenOut]) -> None:
    """The client has taken these tokens; of a choice that the router ended its worker is to make no more."""
    for token in tokens:
        choice = job.emission.choices[token.choice]
        attach.acknowledge(attempt, choice.index, len(choice.token_ids), ended=choice.ended_by_router)


def _is_over_at_workers(job: Job, attempt: Attempt) -> bool:
    """Whether the workers have ended the attempt by themselves, or never began it."""
    if attempt.failure is not None:
        return attempt.failure.kind is FailureKind.REFUSED
    ended_by_worker = job.emission.finished and not any(choice.ended_by_router for choice in job.emission.choices)
    return attempt.committed and ended_by_worker


def _as_baton_error(error: BaseException) -> BatonError:
    """What ended a request, in the terms of `baton.errors`."""
    if isinstance(error, BatonError):
        return error
    if isinstance(error, TimeoutError):
        return DeadlineError("the client's deadline passed")
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return CancelledRequestError("the client cancelled or vanished")
    return InternalError(f"{type(error).__name__}: {error}")
