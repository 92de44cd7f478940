"""What the pipeline tells Prometheus and the log: each request's outcome, latencies and decisions."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from baton.errors import BatonError, CancelledRequestError, DeadlineError
from baton.metrics import RouterMetrics
from baton.requests import FinishReason
from baton.v1 import inference_pb2
from router.job import Job
from router.placement import Placement
from router.recovery import Failure

_log = logging.getLogger(__name__)

_STAGES = ("queue", "reserve", "prefill", "transfer", "first_decode_step", "decode")


class Accounting:
    """The `Observer` that writes the router's series and log lines."""

    def __init__(self, metrics: RouterMetrics) -> None:
        self._metrics = metrics

    def queued(self, num_waiting: int) -> None:
        self._metrics.queued.set(num_waiting)

    def accepted(self, job: Job) -> None:
        num_tokens = len(job.prompt.token_ids)
        self._metrics.prompt_tokens.inc(num_tokens)
        self._metrics.request_prompt_tokens.observe(num_tokens)

    def placed(self, job: Job, placement: Placement) -> None:
        self._metrics.prefill_decisions.labels(placement.decision.value).inc()
        _log.debug(
            "placed on %s, prefill %s", placement.decode.name, placement.decision.value, extra={"request": job.name}
        )

    def reserved(self) -> None:
        self._metrics.running.inc()

    def released(self) -> None:
        self._metrics.running.dec()

    def sent(self, job: Job, deltas: Sequence[inference_pb2.ChoiceDelta], now: float) -> None:
        """Tokens are on their way to the client; several of one choice share the time since the last."""
        if not job.last_token_at:
            self._metrics.ttft_s.observe(now - job.arrived_at)
        for delta in deltas:
            num_tokens = len(delta.token_ids)
            last = job.last_token_at.get(delta.index)
            for _ in range(num_tokens if last is not None else 0):
                assert last is not None
                self._metrics.itl_s.observe((now - last) / num_tokens)
            job.last_token_at[delta.index] = now
            self._metrics.generation_tokens.inc(num_tokens)

    def retried(self, job: Job, failure: Failure) -> None:
        self._metrics.retries.labels(failure.kind.value).inc()
        _log.warning("%s; trying again", failure.error.message, extra={"request": job.name})

    def finished(self, job: Job, timings: inference_pb2.StageTimings, now: float) -> None:
        stopped = any(choice.finish_reason is FinishReason.STOP for choice in job.emission.choices)
        self._metrics.requests.labels("stop" if stopped else "length").inc()
        self._metrics.cached_tokens.inc(job.cached_tokens or 0)
        for stage in _STAGES:
            self._metrics.stage_s.labels(stage).observe(getattr(timings, f"{stage}_s"))
        self._ended(job, now)

    def failed(self, job: Job | None, error: BatonError, now: float) -> None:
        """The request ends without a last message; `job` is None where it was never accepted."""
        if isinstance(error, CancelledRequestError | DeadlineError):
            self._metrics.requests.labels("cancelled").inc()
        elif job is None:
            self._metrics.rejected.labels(error.status.lower()).inc()
        else:
            self._metrics.requests.labels("failed").inc()
            _log.warning("failed: %s", error.message, extra={"request": job.name})
        if job is not None:
            self._ended(job, now)

    def _ended(self, job: Job, now: float) -> None:
        self._metrics.e2e_s.observe(now - job.arrived_at)
        self._metrics.request_generation_tokens.observe(job.emission.num_tokens)
        _log.debug("ended after %d tokens", job.emission.num_tokens, extra={"request": job.name})
