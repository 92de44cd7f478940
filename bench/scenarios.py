"""What `baton bench compare` measures: the scenarios, as data.

A scenario says what is sent, which numbers come of it, and what Baton aims at. It knows nothing of who is compared.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Protocol, Self

import numpy as np

from baton.errors import UnavailableError
from bench.interference import Interference, Mix, Observation, observe
from bench.load.arrivals import gamma_arrivals, schedule
from bench.load.load import Load
from bench.load.measurement import measure
from bench.load.measures import Objectives
from bench.load.outcome import CANCELLED, Outcome
from bench.load.requests import LoadRequest
from bench.load.runner import run_load, warm_up
from bench.load.targets import Target
from bench.load.workloads import Lengths, Vocabulary


@dataclasses.dataclass(frozen=True, slots=True)
class Metric:
    """A number of a scenario.

    Attributes:
        name: of the number in results; ends with its unit.
        label: what tables and plots call it, with the unit.
        scale: what the number is multiplied with to be in the label's unit.
        aim: by which factor the first server is to be better than the second, at least; None where nothing is aimed at.
        limit: what the first server's number itself is not to exceed; None for no limit.
    """

    name: str
    label: str
    higher_is_better: bool = False
    scale: float = 1.0
    aim: float | None = None
    limit: float | None = None

    def advantage(self, first: float, second: float) -> float:
        """How many times better `first` is than `second`; above 1 it is better."""
        better, worse = (first, second) if self.higher_is_better else (second, first)
        return better / worse if worse else math.inf


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """The numbers of one scenario in one round of one server, by the names of its metrics; what can be drawn of it."""

    values: Mapping[str, float]
    observation: Observation | None = None


class Scenario(Protocol):
    """One way of loading a server."""

    @property
    def help(self) -> str:
        """What is sent, in a line."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The numbers that `run` gives."""

    def scaled(self, share: float, *, vocab_size: int) -> Self:
        """The same with `share` times as many requests, for a trial; prompts are drawn from `vocab_size` token ids."""

    async def run(self, target: Target) -> Sample:
        """Warms a server up and measures it.

        Raises:
            BatonError: a request failed.
        """


@dataclasses.dataclass(frozen=True, slots=True)
class InterferenceScenario:
    """Streams beside long prompts: `bench/interference.py`."""

    mix: Mix

    @property
    def help(self) -> str:
        mix = self.mix
        return (
            f"{mix.num_streams} streams ({mix.stream_input_tokens} in, {mix.stream_output_tokens} out) alone, then "
            f"beside {mix.num_long} prompts ({mix.long_input_tokens} in, {mix.long_output_tokens} out), "
            f"{mix.interval_s:g} s apart"
        )

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (
            Metric("alone_itl_p50_s", "alone: ITL p50, ms", scale=1e3),
            Metric("alone_itl_p99_s", "alone: ITL p99, ms", scale=1e3),
            Metric("loaded_itl_p50_s", "loaded: ITL p50, ms", scale=1e3),
            Metric("loaded_itl_p99_s", "loaded: ITL p99, ms", scale=1e3, aim=20.0),
            Metric("loaded_itl_max_s", "loaded: ITL max, ms", scale=1e3),
            Metric("itl_p99_ratio", "ITL p99, loaded over alone", limit=1.5),
            Metric("long_ttft_p50_s", "long prompts: TTFT p50, s", aim=1.0),
        )

    def scaled(self, share: float, *, vocab_size: int) -> Self:
        num_long = _scaled(self.mix.num_long, share)
        return dataclasses.replace(self, mix=dataclasses.replace(self.mix, num_long=num_long, vocab_size=vocab_size))

    async def run(self, target: Target) -> Sample:
        seen = await observe(target, self.mix)
        found = Interference.of(seen)
        values = {
            "alone_itl_p50_s": found.alone.p50,
            "alone_itl_p99_s": found.alone.p99,
            "loaded_itl_p50_s": found.loaded.p50,
            "loaded_itl_p99_s": found.loaded.p99,
            "loaded_itl_max_s": found.loaded.max,
            "itl_p99_ratio": found.p99_ratio,
            "long_ttft_p50_s": found.long_ttft_p50_s,
        }
        return Sample(values, seen)


@dataclasses.dataclass(frozen=True, slots=True)
class ThroughputScenario:
    """Closed loops of random prompts, one after another."""

    loads: tuple[Load, ...]

    @property
    def help(self) -> str:
        return "; ".join(
            f"{load.num_requests} requests ({load.input_tokens} in, {load.output_tokens} out), "
            f"{load.concurrency} at a time"
            for load in self.loads
        )

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return tuple(
            Metric(_throughput(load), f"{load.input_tokens} in, {load.output_tokens} out: tok/s", True, aim=1.25)
            for load in self.loads
        )

    def scaled(self, share: float, *, vocab_size: int) -> Self:
        loads = (
            dataclasses.replace(load, num_requests=_scaled(load.num_requests or 1, share), vocab_size=vocab_size)
            for load in self.loads
        )
        return dataclasses.replace(self, loads=tuple(loads))

    async def run(self, target: Target) -> Sample:
        values = {}
        for load in self.loads:
            measured = await measure(target, load)
            if measured.run.interrupted:
                raise KeyboardInterrupt
            _raise_failure(measured.run.outcomes)
            values[_throughput(load)] = measured.measures.output_tokens_per_s
        return Sample(values)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GoodputScenario:
    """The highest Poisson rate at which a share of the requests is within objectives.

    Each probe sends requests of the same lengths, with the same gaps times a factor, at one rate. The first has no
    rate, but sends one request after another. A server that misses the objectives even so has no goodput at any rate.

    Attributes:
        short, long: tokens of the prompts and of the answers of each kind.
        long_share: of the requests that are long.
        attainment: share of the requests that must meet the objectives.
        num_requests: of a probe.
        first_rate: requests per second of the first probe that has a rate.
        lowest_rate: the search goes no lower; a server that fails there has no goodput.
        tolerance: the search ends when what passed and what failed are within this factor.
        max_probes: the search ends after so many at the latest.
    """

    short: tuple[int, int]
    long: tuple[int, int]
    long_share: float
    objectives: Objectives
    attainment: float = 0.95
    num_requests: int = 60
    first_rate: float = 1.0
    lowest_rate: float = 1 / 16
    tolerance: float = 1.1
    max_probes: int = 10
    vocab_size: int = 1000
    seed: int = 0

    @property
    def help(self) -> str:
        return (
            f"highest Poisson rate at which {self.attainment:.0%} have TTFT <= {self.objectives.ttft_s:g} s and "
            f"TPOT <= {(self.objectives.tpot_s or 0) * 1e3:g} ms; {1 - self.long_share:.0%} {self.short[0]} in, "
            f"{self.short[1]} out, {self.long_share:.0%} {self.long[0]} in, {self.long[1]} out"
        )

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (Metric("goodput_requests_per_s", "goodput, requests/s", higher_is_better=True, aim=2.0),)

    def scaled(self, share: float, *, vocab_size: int) -> Self:
        num_requests = _scaled(self.num_requests, share)
        return dataclasses.replace(self, num_requests=num_requests, vocab_size=vocab_size)

    def requests(self, rate: float | None, probe: int) -> Iterator[LoadRequest]:
        """Those of a probe, with their times where there is a rate. Exactly `long_share` of them are long, at random
        places."""
        is_long = np.zeros(self.num_requests, dtype=bool)
        is_long[: round(self.num_requests * self.long_share)] = True
        np.random.default_rng(self.seed).shuffle(is_long)
        requests = self._requests([self.long if long else self.short for long in is_long], 2 * probe)
        return requests if rate is None else schedule(requests, gamma_arrivals(rate, 1.0, self.seed))

    async def run(self, target: Target) -> Sample:
        probes = itertools.count()

        async def passes(rate: float | None) -> bool:
            return await self._passes(target, rate, next(probes))

        rate = 0.0
        if await passes(None):
            rate = await highest_rate(
                passes,
                first=self.first_rate,
                lowest=self.lowest_rate,
                tolerance=self.tolerance,
                max_probes=self.max_probes,
            )
        return Sample({"goodput_requests_per_s": rate})

    async def _passes(self, target: Target, rate: float | None, probe: int) -> bool:
        """Sends one probe; it ends as soon as too many requests have missed their objectives."""
        # Answered when what the last probe left is worked off.
        await warm_up(target, self._requests([self.short, self.long], 2 * probe + 1))
        stop = asyncio.Event()
        num_allowed = self.num_requests - math.ceil(self.num_requests * self.attainment)
        num_missed = 0

        def count(outcome: Outcome) -> None:
            nonlocal num_missed
            num_missed += not self.objectives.met_by(outcome)
            if num_missed > num_allowed:
                stop.set()

        concurrency = 1 if rate is None else None
        run = await run_load(target, self.requests(rate, probe), concurrency=concurrency, stop=stop, on_ended=count)
        _raise_failure(run.outcomes)
        return num_missed <= num_allowed

    def _requests(self, lengths: Sequence[tuple[int, int]], part: int) -> Iterator[LoadRequest]:
        """Requests of these lengths; prompts of one part of the seed share nothing with those of another."""
        vocabulary = Vocabulary.of_size(self.vocab_size)
        generator = np.random.default_rng([self.seed, part])
        for num_input, num_output in lengths:
            yield LoadRequest(vocabulary.draw(generator, num_input), num_output)


async def highest_rate(
    passes: Callable[[float], Awaitable[bool]], *, first: float, lowest: float, tolerance: float, max_probes: int
) -> float:
    """The highest rate that passed: doubled or halved from `first` until one passes and one fails, then bisected.

    The bisection is geometric. Returns 0 where none passed that is at least `lowest`.
    """
    passed, failed = 0.0, math.inf
    rate = first
    for _ in range(max_probes):
        if await passes(rate):
            passed = rate
        else:
            failed = rate
        if failed <= max(passed * tolerance, lowest):
            break
        rate = passed * 2 if math.isinf(failed) else failed / 2 if passed == 0 else math.sqrt(passed * failed)
    return passed


def _throughput(load: Load) -> str:
    """The name of a load's metric."""
    return f"output_{load.input_tokens}_{load.output_tokens}_tokens_per_s"


def _scaled(count: int, share: float) -> int:
    return max(1, round(count * share))


def _raise_failure(outcomes: list[Outcome]) -> None:
    """A server that refuses is not compared."""
    for outcome in outcomes:
        if outcome.error not in (None, CANCELLED):
            raise UnavailableError(f"a request failed ({outcome.error}): {outcome.error_message}")


def _closed_loop(num_requests: int, concurrency: int, input_tokens: int, output_tokens: int, seed: int) -> Load:
    return Load(
        num_requests=num_requests,
        concurrency=concurrency,
        input_tokens=Lengths(input_tokens, input_tokens),
        output_tokens=Lengths(output_tokens, output_tokens),
        num_warm_up=4,
        seed=seed,
    )


_GOODPUT = GoodputScenario(
    short=(128, 64), long=(2048, 32), long_share=0.1, objectives=Objectives(ttft_s=2.0, tpot_s=0.06), seed=3
)
# Each but the last with a seed of its own, so that no prompt of one begins as one of another does.
SCENARIOS: Mapping[str, Scenario] = {
    "interference": InterferenceScenario(Mix(seed=0)),
    "throughput": ThroughputScenario((_closed_loop(32, 32, 256, 64, seed=1), _closed_loop(128, 64, 32, 128, seed=2))),
    "goodput": _GOODPUT,
    # For machines with a third of the arithmetic of those that the objectives above were chosen on.
    "goodput-relaxed": dataclasses.replace(_GOODPUT, objectives=Objectives(ttft_s=6.0, tpot_s=0.18)),
}
