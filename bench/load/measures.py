"""What the outcomes of a run say: latencies, throughput, and goodput under objectives.

The definitions are those of `vllm bench serve`, with every latency counted from when the request was due. Goodput is
DistServe's (OSDI 2024): requests per second that met all objectives; attainment is their share of all that were due.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np

from bench.load.outcome import CANCELLED, Outcome
from bench.load.runner import LoadRun


@dataclasses.dataclass(frozen=True, slots=True)
class Distribution:
    """Of latencies, in seconds; percentiles are interpolated linearly. All 0 where there are none."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        if not values:
            return cls(0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        p50, p90, p95, p99 = np.percentile(values, (50, 90, 95, 99)).tolist()
        return cls(len(values), float(np.mean(values)), p50, p90, p95, p99, max(values))


@dataclasses.dataclass(frozen=True, slots=True)
class Objectives:
    """What a good request keeps to, in seconds; None for no limit."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def met_by(self, outcome: Outcome) -> bool:
        """Whether an answer is complete and in time. One of a single token has no time per token, and meets any."""
        if not outcome.ok or outcome.ttft_s is None:
            return False
        tpot_s = outcome.tpot_s or 0.0
        return (self.ttft_s is None or outcome.ttft_s <= self.ttft_s) and (self.tpot_s is None or tpot_s <= self.tpot_s)


@dataclasses.dataclass(frozen=True, slots=True)
class Goodput:
    """Requests that met the objectives: how many each second, and their share of all that were due.

    Those that were under way when the run was stopped are not judged.
    """

    objectives: Objectives
    requests_per_s: float
    attainment: float


@dataclasses.dataclass(frozen=True, slots=True)
class Measures:
    """What is reported of a run.

    Latencies are of complete answers; throughput too, over the time from the start to the end of the last answer.

    Attributes:
        ttft: from when a request was due to its first token.
        itl: the gaps between successive events with tokens, all requests together.
        tpot: of each request, the mean time per token after the first.
        latency: from when a request was due to the end of its answer.
        lag: from when a request was due to when it was sent: of the generator, not of the server, unless a concurrency
            made requests wait.
        errors: how many requests ended early, by the name of the gRPC status.
        counted_tokens: what the events told, for comparison with `output_tokens`, which is by the server's usage.
    """

    duration_s: float
    num_due: int
    num_completed: int
    errors: dict[str, int]
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    counted_tokens: int
    requests_per_s: float
    input_tokens_per_s: float
    output_tokens_per_s: float
    ttft: Distribution
    itl: Distribution
    tpot: Distribution
    latency: Distribution
    lag: Distribution
    goodput: Goodput | None

    @classmethod
    def of(cls, run: LoadRun, objectives: Objectives | None = None) -> Self:
        """Measures a run; without objectives there is no goodput."""
        complete = [outcome for outcome in run.outcomes if outcome.ok]
        # Not to the end of the run: stopping takes a moment in which nothing is served.
        ended_s = max((outcome.ended_s or 0.0 for outcome in run.outcomes), default=run.ended_s)
        duration_s = ended_s - run.started_s
        output_tokens = sum(outcome.output_tokens for outcome in complete)
        input_tokens = sum(outcome.prompt_tokens or 0 for outcome in complete)
        return cls(
            duration_s=duration_s,
            num_due=len(run.outcomes),
            num_completed=len(complete),
            errors=dict(collections.Counter(outcome.error for outcome in run.outcomes if outcome.error is not None)),
            input_tokens=input_tokens,
            cached_tokens=sum(outcome.cached_tokens or 0 for outcome in complete),
            output_tokens=output_tokens,
            counted_tokens=sum(sum(outcome.token_counts) for outcome in complete),
            requests_per_s=len(complete) / duration_s,
            input_tokens_per_s=input_tokens / duration_s,
            output_tokens_per_s=output_tokens / duration_s,
            ttft=Distribution.of(_present(outcome.ttft_s for outcome in complete)),
            itl=Distribution.of([gap_s for outcome in complete for gap_s in outcome.itl_s]),
            tpot=Distribution.of(_present(outcome.tpot_s for outcome in complete)),
            latency=Distribution.of(_present(outcome.latency_s for outcome in complete)),
            lag=Distribution.of(_present(outcome.lag_s for outcome in run.outcomes)),
            goodput=None if objectives is None else _goodput(run.outcomes, objectives, duration_s),
        )

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _goodput(outcomes: Sequence[Outcome], objectives: Objectives, duration_s: float) -> Goodput:
    judged = [outcome for outcome in outcomes if outcome.error != CANCELLED]
    num_good = sum(map(objectives.met_by, judged))
    return Goodput(objectives, num_good / duration_s, num_good / len(judged) if judged else 0.0)


def _present(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]
