"""The last requests, each with the stages that it went through: what the live page draws as rows.

An `Observer` on the router's event loop. It keeps numbers, workers' names and the ids of requests, never a prompt or
what was generated, and no more than `max_ended` requests that have ended.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from baton.errors import BatonError, CancelledRequestError, DeadlineError
from baton.requests import FinishReason
from baton.v1 import inference_pb2
from router.job import Job
from router.observation import Observer
from router.placement import Placement
from router.recovery import Failure, FailureKind
from router.request_state import Progress

# Of a request that is preempted again and again the stages of this many last legs are kept.
_MAX_LEGS = 8


class Span(NamedTuple):
    """Time in one stage, in monotonic seconds; `stage` is named as in the metric `baton_request_stage_seconds`."""

    stage: str
    start_s: float
    end_s: float


@dataclasses.dataclass(slots=True, eq=False)
class Leg:
    """One attempt, from the queue to its end.

    Attributes:
        began_at, admitted_at, placed_at, ended_at: monotonic seconds; None where it has not come so far.
        progress: shared with the attempt, since its prefill worker may report after the request has ended.
        failure: why another leg follows; empty in the last one.
    """

    began_at: float
    placement: Placement | None = None
    progress: Progress | None = None
    admitted_at: float | None = None
    placed_at: float | None = None
    ended_at: float | None = None
    failure: str = ""

    @property
    def is_local(self) -> bool:
        """The decode worker prefills."""
        return self.placement is not None and self.placement.prefill is None

    def spans(self, now: float) -> Iterator[Span]:
        """The stages so far, without gaps; the last one ends now, or where the leg ended."""
        end = now if self.ended_at is None else self.ended_at
        start = self.began_at
        for stage, stop in self._boundaries():
            stop = end if stop is None else min(max(stop, start), end)
            yield Span(stage, start, stop)
            if stop >= end:
                return
            start = stop

    def _boundaries(self) -> Iterator[tuple[str, float | None]]:
        """(stage, when it ended); None for the one under way."""
        yield "queue", self.admitted_at
        progress, placed_at = self.progress, self.placed_at
        if progress is None or placed_at is None:
            yield "reserve", None
            return
        if self.is_local and progress.decoding_at is not None:
            # The decode worker may be through before the answer to the reservation is read.
            placed_at = min(placed_at, progress.decoding_at - progress.prefill_s)
        yield "reserve", placed_at
        if self.is_local:
            yield "prefill", progress.decoding_at
        else:
            yield "prefill", progress.first_tokens_at
            yield "transfer", _transferred_at(progress)
        decoding_at = progress.decoding_at if self.is_local else _transferred_at(progress)
        if decoding_at is not None and progress.first_decode_step_s:
            yield "first_decode_step", decoding_at + progress.first_decode_step_s
        yield "decode", None


def _transferred_at(progress: Progress) -> float | None:
    """When the decode worker had all KV; None where it has not yet."""
    if progress.first_tokens_at is None or progress.decoding_at is None:
        return None
    return min(progress.first_tokens_at + progress.exposed_transfer_s(), progress.decoding_at)


@dataclasses.dataclass(slots=True, eq=False, kw_only=True)
class Record:
    """One request.

    Attributes:
        key: unlike that of any other request, which `request_id` need not be.
        arrived_at, first_token_at, ended_at: monotonic seconds.
        cached_tokens: None until it is known.
        outcome: running, stop, length, cancelled or failed.
        error: name of the status that it failed with.
    """

    key: str
    request_id: str
    arrived_at: float
    prompt_tokens: int
    num_choices: int
    legs: collections.deque[Leg]
    num_legs: int = 1
    cached_tokens: int | None = None
    generated_tokens: int = 0
    first_token_at: float | None = None
    ended_at: float | None = None
    outcome: str = "running"
    error: str = ""

    @property
    def stage(self) -> str:
        """The one under way, or the last one."""
        return [span.stage for span in self.legs[-1].spans(float("inf"))][-1]

    def catch_up(self, job: Job) -> None:
        """Notes how far its request is."""
        self.generated_tokens, self.cached_tokens = job.emission.num_tokens, job.cached_tokens
        self.first_token_at = min(job.first_token_at.values(), default=None)

    def end(self, now: float, outcome: str, error: str = "") -> None:
        self.ended_at = self.legs[-1].ended_at = now
        self.outcome, self.error = outcome, error


class Timeline(Observer):
    """What runs now, and what ended last.

    Tokens pass it by: what they change is read of the requests when somebody asks.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float], max_ended: int = 40) -> None:
        self._clock = clock
        self._running: dict[Job, Record] = {}
        self._ended: collections.deque[Record] = collections.deque(maxlen=max_ended)
        self._num_changes = 0

    @property
    def version(self) -> tuple[int, int]:
        """Rises with every change."""
        return self._num_changes, sum(job.emission.num_tokens for job in self._running)

    @property
    def running(self) -> Sequence[Record]:
        """In order of arrival."""
        for job, record in self._running.items():
            record.catch_up(job)
        return list(self._running.values())

    @property
    def ended(self) -> Sequence[Record]:
        """The last of them, in the order in which they ended."""
        return list(self._ended)

    def accepted(self, job: Job) -> None:
        self._running[job] = Record(
            key=job.internal_id,
            request_id=job.request_id,
            arrived_at=job.arrived_at,
            prompt_tokens=len(job.prompt.token_ids),
            num_choices=job.prompt.sampling.n,
            legs=collections.deque([Leg(job.arrived_at)], maxlen=_MAX_LEGS),
        )
        self._num_changes += 1

    def admitted(self, job: Job) -> None:
        self._running[job].legs[-1].admitted_at = self._clock()
        self._num_changes += 1

    def placed(self, job: Job, placement: Placement) -> None:
        assert job.attempt is not None
        leg = self._running[job].legs[-1]
        leg.placed_at = self._clock()
        leg.placement, leg.progress = placement, job.attempt.progress
        self._num_changes += 1

    def retried(self, job: Job, failure: Failure) -> None:
        record, now = self._running[job], self._clock()
        leg = record.legs[-1]
        self._num_changes += 1
        if failure.kind is FailureKind.REFUSED:
            # It is as if it had never left the queue.
            leg.admitted_at = None
            return
        leg.ended_at, leg.failure = now, failure.kind.value
        record.legs.append(Leg(now))
        record.num_legs += 1

    def finished(self, job: Job, timings: inference_pb2.StageTimings, now: float) -> None:
        stopped = any(choice.finish_reason is FinishReason.STOP for choice in job.emission.choices)
        self._end(job, now, "stop" if stopped else "length")

    def failed(self, job: Job | None, error: BatonError, now: float) -> None:
        if job is None:
            return
        if isinstance(error, CancelledRequestError | DeadlineError):
            self._end(job, now, "cancelled", error.status)
        else:
            self._end(job, now, "failed", error.status)

    def _end(self, job: Job, now: float, outcome: str, error: str = "") -> None:
        record = self._running.pop(job)
        record.catch_up(job)
        record.end(now, outcome, error)
        self._ended.append(record)
        self._num_changes += 1
