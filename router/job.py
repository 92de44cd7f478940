"""One request on its way through the pipeline: what was asked, what was delivered, and the attempt under way."""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from collections.abc import Sequence

from baton.hashing import extend_chain
from baton.logs import RequestName
from baton.requests import AttemptRef, Delivered, RequestSpec, SamplingParams
from baton.tracing import trace_id
from baton.v1 import inference_pb2
from router.admission import Entry
from router.emission import Emission
from router.placement import Demand
from router.request_state import Attempt
from router.snapshot import WorkerKey


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A request that was accepted: checked, tokenised and hashed.

    Attributes:
        block_hashes: chained hash of each full block; `salt_root` is the parent of the first.
        sampling: as the client asked; `max_tokens` may be 0.
        include_stop: send the text of what ended a choice too.
        skip_special_tokens: leave special tokens out of the text.
        echo: the prompt as it is sent back; None if not asked for.
    """

    token_ids: tuple[int, ...]
    sampling: SamplingParams
    stops: tuple[str, ...]
    block_hashes: tuple[bytes, ...]
    salt_root: bytes
    block_size: int
    priority: int
    include_stop: bool = False
    skip_special_tokens: bool = True
    echo: inference_pb2.PromptEcho | None = None

    @property
    def generates(self) -> bool:
        """Whether the client wants any token."""
        return self.sampling.max_tokens > 0

    @property
    def needs_workers(self) -> bool:
        return self.generates or self.sampling.prompt_logprobs is not None

    @property
    def worker_sampling(self) -> SamplingParams:
        """What workers are asked for: where the client wants no token, a single one that it is not sent."""
        if self.generates:
            return self.sampling
        return SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=self.sampling.prompt_logprobs)

    def demand(self, delivered: Sequence[Delivered] = ()) -> Demand:
        """What an attempt needs of workers, where the client has this much of each choice."""
        sampling = self.worker_sampling
        # A prompt that is scored is computed whole, whatever is cached.
        is_scored = sampling.prompt_logprobs is not None and not delivered
        if sampling.n > 1:
            own_tokens = [0 if choice.finished else len(choice.token_ids) for choice in delivered]
            return Demand(
                num_tokens=len(self.token_ids),
                own_tokens=own_tokens or [0] * sampling.n,
                block_hashes=() if is_scored else self.block_hashes,
            )
        shared = self.token_ids + delivered[0].token_ids if delivered else self.token_ids
        return Demand(num_tokens=len(shared), block_hashes=() if is_scored else self._hashes_of(shared))

    def _hashes_of(self, token_ids: tuple[int, ...]) -> tuple[bytes, ...]:
        """The block hashes, extended over the tokens that follow the prompt: a worker may still have these cached."""
        parent = self.block_hashes[-1] if self.block_hashes else self.salt_root
        rest = token_ids[len(self.block_hashes) * self.block_size :]
        return (*self.block_hashes, *extend_chain(parent, rest, self.block_size))


@dataclasses.dataclass(slots=True, eq=False, kw_only=True)
class Job:
    """The mutable rest; belongs to the request's own task.

    Attributes:
        request_id: the client's name for it, which it may use again; workers do not see it.
        internal_id: workers' name for it, unlike that of any other request of any router.
        arrived_at, deadline, first_token_at, last_token_at: in monotonic seconds; the last two for each choice.
        decode_worker: where the last attempt was placed.
        is_over: the last message is made; whether the client takes it changes nothing any more.
        attempt_number: from 1; rises with each attempt that may have changed something at a worker.
        attempt: None while the request is queued.
        expiry: tells the attempt of the client's deadline, where there is one.
        cached_tokens: prompt tokens that no worker has computed in any attempt.
        trace_context: gRPC metadata by which workers' spans join the request's trace; empty where nothing is traced.
    """

    request_id: str
    prompt: Prompt
    emission: Emission
    entry: Entry
    arrived_at: float
    deadline: float | None
    internal_id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    attempt_number: int = 1
    num_retries: int = 0
    attempt: Attempt | None = None
    expiry: asyncio.TimerHandle | None = None
    cached_tokens: int | None = None
    first_token_at: dict[int, float] = dataclasses.field(default_factory=dict)
    last_token_at: dict[int, float] = dataclasses.field(default_factory=dict)
    decode_worker: WorkerKey | None = None
    is_over: bool = False
    trace_context: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> RequestName:
        """For logs: the client's name for it, and the workers'."""
        return RequestName(self.internal_id, self.attempt_number, self.request_id, trace_id(self.trace_context))

    @property
    def ref(self) -> AttemptRef:
        """Names the current attempt to workers."""
        return AttemptRef(self.internal_id, self.attempt_number)

    def demand(self) -> Demand:
        """What the next attempt needs of workers."""
        return self.prompt.demand(self._delivered())

    def spec(self, *, router_id: str, max_unacked_tokens: int, now: float) -> RequestSpec:
        """What workers are told of the attempt that begins now."""
        delivered = self._delivered()
        sampling = self.prompt.worker_sampling
        if delivered and sampling.prompt_logprobs is not None:
            # They went out with the first tokens.
            sampling = dataclasses.replace(sampling, prompt_logprobs=None)
        return RequestSpec(
            ref=self.ref,
            router_id=router_id,
            prompt_token_ids=self.prompt.token_ids,
            sampling=sampling,
            delivered=delivered,
            block_hashes=self.prompt.block_hashes,
            salt_root=self.prompt.salt_root,
            priority=self.prompt.priority,
            timeout_s=None if self.deadline is None else max(self.deadline - now, 0.001),
            max_unacked_tokens=max_unacked_tokens,
        )

    def note_cached(self, cached_tokens: int | None) -> None:
        """An attempt found this much cached; a later one may find what an earlier one computed."""
        if cached_tokens is not None:
            known = len(self.prompt.token_ids) if self.cached_tokens is None else self.cached_tokens
            self.cached_tokens = min(known, cached_tokens)

    def note_sent(self, choice: int, num_tokens: int, now: float) -> float | None:
        """Tokens of a choice leave together; the time for each since the last one, None with a choice's first."""
        last = self.last_token_at.get(choice)
        self.last_token_at[choice] = now
        if last is None:
            self.first_token_at[choice] = now
            return None
        return (now - last) / num_tokens

    def usage(self) -> inference_pb2.Usage:
        return inference_pb2.Usage(
            prompt_tokens=len(self.prompt.token_ids),
            cached_tokens=self.cached_tokens or 0,
            completion_tokens=self.emission.num_tokens,
        )

    def timings(self, attempt: Attempt, now: float) -> inference_pb2.StageTimings:
        """Of the last attempt."""
        placement, progress = attempt.placement, attempt.progress
        return inference_pb2.StageTimings(
            queue_s=progress.queue_s,
            reserve_s=progress.reserve_s,
            prefill_s=progress.prefill_s,
            transfer_s=progress.exposed_transfer_s(),
            first_decode_step_s=progress.first_decode_step_s,
            decode_s=progress.decode_time_s(now),
            local_prefill=placement.prefill is None,
            attempts=self.attempt_number,
            prefill_worker=placement.prefill.name if placement.prefill else "",
            decode_worker=placement.decode.name,
        )

    def _delivered(self) -> tuple[Delivered, ...]:
        return self.emission.delivered() if self.emission.num_tokens else ()
