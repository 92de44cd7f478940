"""When requests arrive, in seconds from the start of a run: endless and never decreasing."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator

import numpy as np

from bench.load.requests import LoadRequest


def gamma_arrivals(rate: float, burstiness: float, seed: int) -> Iterator[float]:
    """A renewal process with gamma-distributed gaps of the mean 1 / `rate`, as `vllm bench serve --burstiness` has it.

    `burstiness` is the shape: 1 gives exponential gaps and thus a Poisson process, less is burstier, more is more even,
    infinity is a fixed interval. The squared coefficient of variation of the gaps is 1 / burstiness.

    Args:
        rate: requests per second; infinity has all arrive at 0.

    Raises:
        ValueError: one of them is not above 0.
    """
    if not rate > 0:
        raise ValueError(f"rate: must be above 0, got {rate:g}")
    if not burstiness > 0:
        raise ValueError(f"burstiness: must be above 0, got {burstiness:g}")
    if math.isinf(rate):
        return itertools.repeat(0.0)
    if math.isinf(burstiness):
        return (index / rate for index in itertools.count())
    generator = np.random.default_rng(seed)
    return itertools.accumulate(generator.gamma(burstiness, 1 / (rate * burstiness)) for _ in itertools.count())


def schedule(requests: Iterable[LoadRequest], arrivals: Iterable[float]) -> Iterator[LoadRequest]:
    """The requests with their times of arrival."""
    for request, arrival_s in zip(requests, arrivals, strict=False):
        yield dataclasses.replace(request, arrival_s=arrival_s)
