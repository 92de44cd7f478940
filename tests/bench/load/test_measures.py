"""Measures against values computed by hand."""

from __future__ import annotations

import pytest

from bench.load.measures import Distribution, Measures, Objectives
from bench.load.outcome import CANCELLED
from bench.load.runner import LoadRun
from tests.bench.load.outcomes import make_outcome


def test_the_times_of_a_request() -> None:
    outcome = make_outcome(11.5, 11.7, 12.1, scheduled_s=10.0, sent_s=10.5, ended_s=12.2)
    assert outcome.lag_s == pytest.approx(0.5)
    assert outcome.ttft_s == pytest.approx(1.5)
    assert outcome.itl_s == pytest.approx([0.2, 0.4])
    assert outcome.tpot_s == pytest.approx(0.3)
    assert outcome.latency_s == pytest.approx(2.2)


def test_an_event_with_several_tokens_is_one_gap_and_counts_in_the_time_per_token() -> None:
    outcome = make_outcome(1.0, 1.4, counts=[1, 4])
    assert outcome.output_tokens == 5
    assert outcome.itl_s == pytest.approx([0.4])
    assert outcome.tpot_s == pytest.approx(0.1)


def test_the_servers_count_wins() -> None:
    outcome = make_outcome(1.0, 1.8, completion_tokens=9)
    assert outcome.output_tokens == 9
    assert outcome.tpot_s == pytest.approx(0.1)


def test_a_single_token_has_no_time_per_token_and_no_token_no_times() -> None:
    assert make_outcome(1.0).tpot_s is None
    assert make_outcome(error="unavailable").ttft_s is None


def test_percentiles_are_interpolated() -> None:
    found = Distribution.of([4.0, 1.0, 3.0, 2.0])
    assert (found.count, found.mean, found.p50, found.max) == (4, 2.5, 2.5, 4.0)
    assert (found.p90, found.p95, found.p99) == pytest.approx((3.7, 3.85, 3.97))
    assert Distribution.of([]) == Distribution(0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def test_a_run() -> None:
    outcomes = [
        make_outcome(1.0, 1.5, 2.0, ended_s=2.0),
        make_outcome(3.0, 4.0, scheduled_s=1.0, ended_s=4.0),
        make_outcome(error="resource_exhausted", ended_s=1.0),
        make_outcome(2.5, error="unavailable", ended_s=3.0),
    ]
    measures = Measures.of(LoadRun(outcomes, 0.0, 5.0, interrupted=False))
    assert (measures.num_due, measures.num_completed) == (4, 2)
    assert measures.errors == {"resource_exhausted": 1, "unavailable": 1}
    # To the end of the last request, not of the run.
    assert measures.duration_s == 4.0
    assert (measures.output_tokens, measures.output_tokens_per_s) == (5, 1.25)
    assert (measures.input_tokens, measures.requests_per_s) == (6, 0.5)
    assert (measures.ttft.mean, measures.ttft.max) == (1.5, 2.0)
    assert (measures.itl.count, measures.itl.p50, measures.itl.max) == (3, 0.5, 1.0)
    assert measures.tpot.mean == 0.75
    assert measures.latency.mean == 2.5
    assert measures.goodput is None


def test_goodput_counts_complete_answers_within_both_objectives() -> None:
    outcomes = [
        make_outcome(1.0, 1.1),
        make_outcome(1.1, 1.2),
        make_outcome(1.0, 1.2),
        make_outcome(0.5),
        make_outcome(1.0, 1.1, error="unavailable", ended_s=4.0),
        make_outcome(error=CANCELLED),
    ]
    run = LoadRun(outcomes, 0.0, 4.0, interrupted=True)
    goodput = Measures.of(run, Objectives(ttft_s=1.0, tpot_s=0.15)).goodput
    assert goodput is not None
    # The first and the one with a single token; what the run's end cut off is not judged.
    assert (goodput.requests_per_s, goodput.attainment) == (2 / 4, 2 / 5)
    only_first_tokens = Measures.of(run, Objectives(ttft_s=1.0)).goodput
    assert only_first_tokens is not None
    assert only_first_tokens.attainment == 3 / 5


def test_a_run_of_nothing() -> None:
    measures = Measures.of(LoadRun([], 0.0, 1.0, interrupted=True), Objectives(ttft_s=1.0))
    assert (measures.num_due, measures.duration_s, measures.requests_per_s) == (0, 1.0, 0.0)
    assert measures.goodput is not None
    assert measures.goodput.attainment == 0.0
