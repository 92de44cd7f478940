"""What the comparison sends, and how it finds a rate."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from bench.load.measures import Objectives
from bench.load.outcome import Outcome
from bench.load.targets import ServedModel, open_target
from bench.scenarios import (
    SCENARIOS,
    GoodputScenario,
    InterferenceScenario,
    Metric,
    ThroughputScenario,
    highest_rate,
)
from bench.servers import Server

GOODPUT = GoodputScenario(
    short=(8, 2), long=(64, 3), long_share=0.1, objectives=Objectives(2.0, 0.06), num_requests=20, vocab_size=1000
)


class Capacity:
    """Passes rates up to a limit, and remembers what was tried."""

    def __init__(self, limit: float) -> None:
        self.tried: list[float] = []
        self._limit = limit

    async def passes(self, rate: float) -> bool:
        self.tried.append(rate)
        return rate <= self._limit


@pytest.mark.parametrize("limit", [0.3, 1.0, 1.05, 3.7, 100.0])
async def test_the_highest_rate_is_found_within_the_tolerance(limit: float) -> None:
    rate = await highest_rate(Capacity(limit).passes, first=1.0, lowest=0.0, tolerance=1.1, max_probes=100)
    assert rate <= limit <= rate * 1.1


async def test_the_search_doubles_then_bisects() -> None:
    capacity = Capacity(5.0)
    assert await highest_rate(capacity.passes, first=1.0, lowest=0.0, tolerance=1.2, max_probes=100) == pytest.approx(
        4.757, rel=1e-3
    )
    assert capacity.tried[:4] == [1.0, 2.0, 4.0, 8.0]
    assert capacity.tried[4] == pytest.approx(math.sqrt(32))


async def test_the_search_ends_at_a_number_of_probes() -> None:
    none = Capacity(0.0)
    assert await highest_rate(none.passes, first=1.0, lowest=0.0, tolerance=1.1, max_probes=3) == 0.0
    assert none.tried == [1.0, 0.5, 0.25]


async def test_the_search_goes_no_lower_than_it_is_told() -> None:
    few = Capacity(0.1)
    assert await highest_rate(few.passes, first=1.0, lowest=0.25, tolerance=1.1, max_probes=100) == 0.0
    assert few.tried == [1.0, 0.5, 0.25]


def test_every_probe_has_the_same_lengths_and_gaps_but_other_prompts() -> None:
    one, two = list(GOODPUT.requests(1.0, 0)), list(GOODPUT.requests(4.0, 1))

    def lengths(requests: list[Any]) -> list[tuple[int, int]]:
        return [(len(request.prompt), request.max_tokens) for request in requests]

    assert lengths(one) == lengths(two)
    assert sorted(set(lengths(one))) == [(8, 2), (64, 3)]
    assert lengths(one).count((64, 3)) == 2
    slow, fast = ([request.arrival_s or 0.0 for request in requests] for requests in (one, two))
    assert slow == pytest.approx([4 * arrival_s for arrival_s in fast])
    assert slow == sorted(slow)
    assert slow[-1] > 0
    assert not {tuple(request.prompt[:8]) for request in one} & {tuple(request.prompt[:8]) for request in two}


class Answers:
    """A target that answers at once, but for some requests whose first token comes late."""

    def __init__(self, num_late: int) -> None:
        self.num_sent = 0
        self._num_late = num_late

    async def served_model(self) -> ServedModel:
        return ServedModel("fake")

    async def send(self, outcome: Outcome) -> None:
        # The first two of a probe warm up.
        self.num_sent += 1
        late_s = 10.0 if 2 < self.num_sent <= 2 + self._num_late else 0.0
        for _ in range(outcome.request.max_tokens):
            outcome.add_tokens(outcome.scheduled_s + late_s, 1)

    async def close(self) -> None:
        """Nothing is open."""


@pytest.mark.parametrize(("num_late", "rate"), [(0, 1e5), (1, 1e5), (2, 0.0)])
async def test_a_probe_passes_when_enough_requests_are_in_time(num_late: int, rate: float) -> None:
    probe = dataclasses.replace(GOODPUT, first_rate=1e5, max_probes=1)
    sample = await probe.run(Answers(num_late))
    assert sample.values == {"goodput_requests_per_s": rate}


async def test_a_server_that_misses_the_objectives_alone_is_sent_no_load() -> None:
    answers = Answers(2)
    assert (await GOODPUT.run(answers)).values == {"goodput_requests_per_s": 0.0}
    assert answers.num_sent < 2 + GOODPUT.num_requests


def test_an_advantage_above_one_is_always_better() -> None:
    more, less = Metric("rate_per_s", "rate", higher_is_better=True), Metric("time_s", "time")
    assert (more.advantage(4.0, 2.0), less.advantage(4.0, 2.0)) == (2.0, 0.5)
    assert more.advantage(4.0, 0.0) == math.inf


def test_the_scenarios_are_what_docs_promise() -> None:
    interference, throughput, goodput = SCENARIOS["interference"], SCENARIOS["throughput"], SCENARIOS["goodput"]
    assert interference.help == (
        "8 streams (64 in, 256 out) alone, then beside 4 prompts (2048 in, 32 out), 0.8 s apart"
    )
    assert throughput.help == (
        "32 requests (256 in, 64 out), 32 at a time; 128 requests (32 in, 128 out), 64 at a time"
    )
    assert goodput.help == (
        "highest Poisson rate at which 95% have TTFT <= 2 s and TPOT <= 60 ms; 90% 128 in, 64 out, 10% 2048 in, 32 out"
    )


def test_a_share_scales_the_numbers_of_requests() -> None:
    interference = SCENARIOS["interference"].scaled(0.5, vocab_size=77)
    assert isinstance(interference, InterferenceScenario)
    assert (interference.mix.num_long, interference.mix.vocab_size) == (2, 77)
    throughput = SCENARIOS["throughput"].scaled(0.01, vocab_size=77)
    assert isinstance(throughput, ThroughputScenario)
    assert [(load.num_requests, load.vocab_size) for load in throughput.loads] == [(1, 77), (1, 77)]
    goodput = SCENARIOS["goodput"].scaled(2.0, vocab_size=77)
    assert isinstance(goodput, GoodputScenario)
    assert (goodput.num_requests, goodput.vocab_size) == (120, 77)


@pytest.mark.parametrize(
    ("name", "share"),
    [("interference", 0.25), ("throughput", 0.05), ("goodput", 0.02)],
)
async def test_a_scenario_gives_its_metrics(name: str, share: float, fake_server: Server) -> None:
    scenario = SCENARIOS[name].scaled(share, vocab_size=1000)
    if isinstance(scenario, InterferenceScenario):
        scenario = InterferenceScenario(dataclasses.replace(scenario.mix, alone_s=0.3))
    if isinstance(scenario, GoodputScenario):
        scenario = dataclasses.replace(scenario, first_rate=100.0, max_probes=2)
    target = open_target(fake_server.url)
    try:
        await target.served_model()
        sample = await scenario.run(target)
    finally:
        await target.close()
    assert list(sample.values) == [metric.name for metric in scenario.metrics]
    # Tokens that come together have no time between them.
    assert all(0 <= value < math.inf for value in sample.values.values())
    assert (sample.observation is not None) == (name == "interference")
