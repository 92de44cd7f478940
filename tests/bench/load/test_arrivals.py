"""The statistics of arrivals."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from bench.load.arrivals import gamma_arrivals, schedule
from bench.load.requests import LoadRequest


def gaps(rate: float, burstiness: float, count: int = 20_000) -> np.ndarray:
    times = np.fromiter(gamma_arrivals(rate, burstiness, seed=1), float, count)
    return np.diff(times, prepend=0.0)


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 4.0])
def test_gaps_have_the_mean_and_the_variation_that_were_asked_for(burstiness: float) -> None:
    found = gaps(5.0, burstiness)
    assert found.min() >= 0
    assert found.mean() == pytest.approx(1 / 5, rel=0.05)
    # The squared coefficient of variation of a gamma distribution is one over its shape.
    assert found.var() / found.mean() ** 2 == pytest.approx(1 / burstiness, rel=0.1)


def test_burstiness_one_is_a_poisson_process() -> None:
    times = np.fromiter(gamma_arrivals(5.0, 1.0, seed=2), float, 20_000)
    counts = np.bincount(times.astype(int))[:-1]
    assert counts.mean() == pytest.approx(5.0, rel=0.05)
    assert counts.var() == pytest.approx(5.0, rel=0.1)


def test_infinite_burstiness_is_a_fixed_interval() -> None:
    assert list(itertools.islice(gamma_arrivals(4.0, math.inf, seed=0), 4)) == [0.0, 0.25, 0.5, 0.75]


def test_an_infinite_rate_has_all_at_once() -> None:
    assert list(itertools.islice(gamma_arrivals(math.inf, 1.0, seed=0), 3)) == [0.0, 0.0, 0.0]


def test_a_seed_gives_the_same_times() -> None:
    first, again, other = (list(itertools.islice(gamma_arrivals(1.0, 1.0, seed), 5)) for seed in (3, 3, 4))
    assert first == again != other


@pytest.mark.parametrize(("rate", "burstiness", "field"), [(0.0, 1.0, "rate"), (1.0, -1.0, "burstiness")])
def test_what_is_not_positive_is_refused(rate: float, burstiness: float, field: str) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: must be above 0"):
        gamma_arrivals(rate, burstiness, seed=0)


def test_requests_get_their_times() -> None:
    requests = [LoadRequest([1], 1), LoadRequest([2], 1)]
    assert [request.arrival_s for request in schedule(requests, iter([0.5, 1.5, 2.5]))] == [0.5, 1.5]
