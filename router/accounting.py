"""What the pipeline and the membership tell Prometheus and the log: outcomes, latencies, decisions, workers."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable

from baton.errors import BatonError, CancelledRequestError, DeadlineError, InvalidRequestError
from baton.metrics import ClusterMetrics, RouterMetrics
from baton.metrics.router import ROLES, SOURCES
from baton.requests import FinishReason
from baton.v1 import inference_pb2
from router.job import Job
from router.observation import Observer
from router.placement import Placement
from router.recovery import Failure
from router.snapshot import ClusterSnapshot, WorkerKey

_log = logging.getLogger(__name__)

# Those that the pipeline times; intake is timed here.
_TIMED_STAGES = ("queue", "reserve", "prefill", "transfer", "first_decode_step", "decode")


@dataclasses.dataclass(frozen=True, slots=True)
class Objectives:
    """What a request's time to first token and time per output token should not exceed, in seconds."""

    ttft_s: float
    tpot_s: float


class Accounting(Observer):
    """The `Observer` that writes the router's series and log lines.

    Args:
        clock: the pipeline's.
    """

    def __init__(
        self, metrics: RouterMetrics, objectives: Objectives, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._metrics = metrics
        self._objectives = objectives
        self._clock = clock
        # Looked up once: they are written for every token.
        self._observe_itl_s = metrics.itl_s.observe
        self._count_generated = metrics.generation_tokens.inc
        # And these for every request, some before its first token.
        self._observe_stage_s = {stage: metrics.stage_s.labels(stage).observe for stage in ("intake", *_TIMED_STAGES)}
        self._count_prompt_tokens = {source: metrics.prompt_tokens_by_source.labels(source).inc for source in SOURCES}
        metrics.slo_targets.labels("ttft").set(objectives.ttft_s)
        metrics.slo_targets.labels("tpot").set(objectives.tpot_s)

    def queued(self, num_waiting: int) -> None:
        self._metrics.queued.set(num_waiting)

    def accepted(self, job: Job) -> None:
        sampling = job.prompt.sampling
        self._metrics.request_prompt_tokens.observe(len(job.prompt.token_ids))
        self._metrics.request_max_tokens.observe(sampling.max_tokens)
        self._metrics.request_n.observe(sampling.n)
        self._observe_stage_s["intake"](self._clock() - job.arrived_at)

    def placed(self, job: Job, placement: Placement) -> None:
        self._metrics.decisions.labels(placement.decision.value).inc()
        if job.first_token_at and job.decode_worker not in (None, placement.decode):
            self._metrics.migrations.inc()
        job.decode_worker = placement.decode
        _log.debug(
            "placed on %s, prefill %s", placement.decode.name, placement.decision.value, extra={"request": job.name}
        )

    def reserved(self) -> None:
        self._metrics.running.inc()

    def released(self) -> None:
        self._metrics.running.dec()

    def sent(self, job: Job, choice: int, num_tokens: int, gap_s: float | None, now: float) -> None:
        self._count_generated(num_tokens)
        if gap_s is None:
            if len(job.first_token_at) == 1:
                self._metrics.ttft_s.observe(now - job.arrived_at)
                self._count_prompt(job)
            # Those that come with a choice's first have no time between them.
            num_tokens, gap_s = num_tokens - 1, 0.0
        for _ in range(num_tokens):
            self._observe_itl_s(gap_s)

    def retried(self, job: Job, failure: Failure) -> None:
        self._metrics.retries.labels(failure.kind.value).inc()
        _log.warning("%s; trying again", failure.error.message, extra={"request": job.name})

    def finished(self, job: Job, timings: inference_pb2.StageTimings, now: float) -> None:
        stopped = any(choice.finish_reason is FinishReason.STOP for choice in job.emission.choices)
        self._metrics.requests.labels("stop" if stopped else "length").inc()
        if not job.first_token_at:
            self._count_prompt(job)
        for stage in _TIMED_STAGES:
            self._observe_stage_s[stage](getattr(timings, f"{stage}_s"))
        self._metrics.e2e_s.observe(now - job.arrived_at)
        self._metrics.request_generation_tokens.observe(job.emission.num_tokens)
        if (tpot_s := _time_per_output_token_s(job)) is not None:
            self._metrics.tpot_s.observe(tpot_s)
        self._ended(job, now)

    def failed(self, job: Job | None, error: BatonError, now: float) -> None:
        """The request ends without a last message; `job` is None where it was never accepted.

        What only a worker could find invalid counts as refused all the same: it is the client's doing.
        """
        if isinstance(error, CancelledRequestError):
            self._metrics.requests.labels("cancelled").inc()
        elif isinstance(error, DeadlineError):
            self._metrics.requests.labels("deadline").inc()
        elif job is None or isinstance(error, InvalidRequestError):
            self._metrics.rejected.labels(error.status.lower()).inc()
            job = None
        else:
            self._metrics.requests.labels("failed").inc()
            _log.warning("failed: %s", error.message, extra={"request": job.name})
        if job is not None:
            self._ended(job, now)

    def _count_prompt(self, job: Job) -> None:
        """Once a request, when the attempt that got to its first token has told what was cached where."""
        attempt = job.attempt
        if attempt is None:
            return
        num_tokens, at_decode_worker = len(job.prompt.token_ids), attempt.progress.decode_cached_tokens
        self._count_prompt_tokens["local_cache_hit"](at_decode_worker)
        if attempt.placement.prefill is None:
            self._count_prompt_tokens["local_compute"](num_tokens - at_decode_worker)
            cached = at_decode_worker
        else:
            self._count_prompt_tokens["kv_transfer"](num_tokens - at_decode_worker)
            cached = job.cached_tokens or 0
        self._metrics.prompt_tokens.inc(num_tokens)
        self._metrics.cached_tokens.inc(cached)
        self._metrics.request_computed_tokens.observe(num_tokens - cached)

    def _ended(self, job: Job, now: float) -> None:
        self._judge(job, now)
        _log.debug("ended after %d tokens", job.emission.num_tokens, extra={"request": job.name})

    def _judge(self, job: Job, now: float) -> None:
        """Holds the request against the objectives; it is left out where it ended too early to tell."""
        has_token = bool(job.first_token_at)
        waited_s = (min(job.first_token_at.values()) if has_token else now) - job.arrived_at
        in_time = waited_s <= self._objectives.ttft_s
        if in_time and not has_token:
            return
        tpot_s = _time_per_output_token_s(job)
        at_pace = tpot_s is None or tpot_s <= self._objectives.tpot_s
        self._metrics.slo_requests.labels("met" if in_time else "missed", "met" if at_pace else "missed").inc()


class ClusterAccounting:
    """Counts workers as they come and go: a listener of `Membership`."""

    def __init__(self, metrics: ClusterMetrics) -> None:
        self._metrics = metrics
        self._members: dict[WorkerKey, str] = {}
        # Looked up once: they are written after every state of a worker.
        self._connected = [metrics.workers.labels(role) for role in ROLES]

    def changed(self, snapshot: ClusterSnapshot, key: WorkerKey | None) -> None:
        """`key` is None where workers came or went."""
        for gauge, views in zip(self._connected, (snapshot.prefill, snapshot.decode), strict=True):
            gauge.set(sum([view.connected for view in views]))
        if key is not None:
            return
        members = {view.key: view.role for view in (*snapshot.prefill, *snapshot.decode)}
        for incarnation in members.keys() - self._members.keys():
            self._metrics.joins.labels(members[incarnation]).inc()
        for incarnation in self._members.keys() - members.keys():
            self._metrics.departures.labels(self._members[incarnation]).inc()
        self._members = members


def _time_per_output_token_s(job: Job) -> float | None:
    """Mean time between two tokens of a choice; None where no choice has two."""
    num_gaps = sum(max(len(choice.token_ids) - 1, 0) for choice in job.emission.choices)
    if not num_gaps:
        return None
    return (sum(job.last_token_at.values()) - sum(job.first_token_at.values())) / num_gaps
