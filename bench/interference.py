"""`baton bench interference`: what long prompts do to the streams of others.

Streams decode without a pause; after a while long prompts arrive beside them. What a user of one of the streams sees
are its inter-token latencies (ITL), first while the streams are alone, then while a long prompt is with the server.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import statistics
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

import click
import numpy as np
import uvloop

from baton.errors import UnavailableError
from bench import report
from bench.load.measures import Distribution
from bench.load.options import make_target, target_options
from bench.load.outcome import CANCELLED, Outcome
from bench.load.requests import LoadRequest
from bench.load.runner import LoadRun, run_load, warm_up
from bench.load.targets import Api, ServedModel, Target
from bench.load.workloads import Vocabulary, as_chats
from bench.plots import write_plot
from bench.provenance import Provenance
from bench.report import TableText

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The streams go on for so long after the last long answer that every gap which it touched ends.
_TAIL_S = 0.5
# The parts of the seed.
_STREAMS, _LONG_PROMPTS, _FIRST_STREAM, _FIRST_LONG_PROMPT = range(4)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """What is sent.

    Attributes:
        num_streams: answers that are under way at all times; where one ends the next begins.
        interval_s: seconds from the arrival of one long prompt to that of the next.
        alone_s: seconds from the start of the streams to the first long prompt.
    """

    num_streams: int = 8
    stream_input_tokens: int = 64
    stream_output_tokens: int = 256
    num_long: int = 4
    long_input_tokens: int = 2048
    long_output_tokens: int = 32
    interval_s: float = 0.8
    alone_s: float = 10.0
    api: Api = "completions"
    vocab_size: int | None = None
    seed: int = 0

    def streams(self, model: ServedModel) -> Iterator[LoadRequest]:
        """Endless. The first answers differ in length, so that from then on the streams end at different times."""
        requests = self._requests(model, _STREAMS, self.stream_input_tokens, self.stream_output_tokens)
        return (
            dataclasses.replace(request, max_tokens=max(2, request.max_tokens * number // self.num_streams))
            if number < self.num_streams
            else request
            for number, request in enumerate(requests, start=1)
        )

    def long_prompts(self, model: ServedModel) -> Iterator[LoadRequest]:
        """With their times of arrival."""
        requests = self._requests(model, _LONG_PROMPTS, self.long_input_tokens, self.long_output_tokens)
        for index, request in zip(range(self.num_long), requests, strict=False):
            yield dataclasses.replace(request, arrival_s=index * self.interval_s)

    def warm_up_requests(self, model: ServedModel) -> Iterator[LoadRequest]:
        """One stream and one long prompt, of tokens that are not sent again."""
        yield next(self._requests(model, _FIRST_STREAM, self.stream_input_tokens, self.stream_output_tokens))
        yield next(self._requests(model, _FIRST_LONG_PROMPT, self.long_input_tokens, self.long_output_tokens))

    def _requests(self, model: ServedModel, part: int, num_input: int, num_output: int) -> Iterator[LoadRequest]:
        """Endless; `part` is what makes those of one kind differ from those of another."""
        vocabulary = Vocabulary.of_model(model, self.vocab_size)
        generator = np.random.default_rng([self.seed, part])
        requests = (LoadRequest(vocabulary.draw(generator, num_input), num_output) for _ in itertools.count())
        return as_chats(requests) if self.api == "chat" else requests


@dataclasses.dataclass(frozen=True, slots=True)
class Observation:
    """Everything that was seen; times are seconds of `time.perf_counter`.

    Attributes:
        alone_s, loaded_s: start and end of the two windows. Alone: from when each stream has had a token to when the
            first long prompt was due; loaded: from there to the end of the last long answer.
    """

    streams: list[Outcome]
    long_prompts: list[Outcome]
    alone_s: tuple[float, float]
    loaded_s: tuple[float, float]

    @classmethod
    def of(cls, streams: LoadRun, long_prompts: LoadRun, num_streams: int) -> Self:
        """Finds the windows.

        Raises:
            UnavailableError: a request failed, or the streams were not all under way before the first long prompt.
        """
        for outcome in (*streams.outcomes, *long_prompts.outcomes):
            if outcome.error not in (None, CANCELLED):
                raise UnavailableError(f"a request failed ({outcome.error}): {outcome.error_message}")
        began_s = [outcome.token_times_s[0] for outcome in streams.outcomes[:num_streams] if outcome.token_times_s]
        first_s = long_prompts.started_s
        if len(began_s) < num_streams or max(began_s) >= first_s:
            raise UnavailableError("the streams had not all begun when the first long prompt was due; use --alone-s")
        last_s = max(outcome.ended_s or first_s for outcome in long_prompts.outcomes)
        return cls(streams.outcomes, long_prompts.outcomes, (max(began_s), first_s), (first_s, last_s))

    def gaps(self) -> Iterator[tuple[float, float]]:
        """Start and end of each gap between successive tokens of one answer, over all streams."""
        for outcome in self.streams:
            yield from zip(outcome.token_times_s, outcome.token_times_s[1:], strict=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Interference:
    """What an observation says.

    Attributes:
        alone: ITL of the gaps that lie within the window in which the streams were alone.
        loaded: ITL of the gaps that overlap the window in which long prompts were with the server.
        long_ttft_s: of each long prompt, in the order of arrival.
        alone_s, loaded_s: the lengths of the two windows.
    """

    alone: Distribution
    loaded: Distribution
    long_ttft_s: list[float]
    alone_s: float
    loaded_s: float

    @classmethod
    def of(cls, seen: Observation) -> Self:
        """Sorts the gaps into the windows.

        Raises:
            UnavailableError: there are none to compare with.
        """
        alone, loaded = [], []
        for start_s, end_s in seen.gaps():
            if seen.alone_s[0] <= start_s and end_s <= seen.alone_s[1]:
                alone.append(end_s - start_s)
            elif end_s > seen.loaded_s[0] and start_s < seen.loaded_s[1]:
                loaded.append(end_s - start_s)
        if not any(alone) or not loaded:
            raise UnavailableError("too few tokens came while the streams were alone; use a longer --alone-s")
        return cls(
            Distribution.of(alone),
            Distribution.of(loaded),
            [outcome.ttft_s or 0.0 for outcome in seen.long_prompts],
            seen.alone_s[1] - seen.alone_s[0],
            seen.loaded_s[1] - seen.loaded_s[0],
        )

    @property
    def p99_ratio(self) -> float:
        """How many times the p99 of the streams grows when long prompts come."""
        return self.loaded.p99 / self.alone.p99

    @property
    def long_ttft_p50_s(self) -> float:
        return statistics.median(self.long_ttft_s)

    def to_json(self) -> dict[str, Any]:
        """The distributions are in seconds as well."""
        return {**dataclasses.asdict(self), "p99_ratio": self.p99_ratio, "long_ttft_p50_s": self.long_ttft_p50_s}


async def observe(target: Target, mix: Mix) -> Observation:
    """Warms the server up, runs the streams, and the long prompts beside them.

    Raises:
        BatonError: the server cannot be reached, or a request failed.
    """
    model = await target.served_model()
    await warm_up(target, mix.warm_up_requests(model))
    stop = asyncio.Event()

    def end_on_failure(outcome: Outcome) -> None:
        if not outcome.ok:
            stop.set()

    streaming = asyncio.create_task(
        run_load(target, mix.streams(model), concurrency=mix.num_streams, stop=stop, on_ended=end_on_failure)
    )
    try:
        await asyncio.wait([streaming], timeout=mix.alone_s)
        long_prompts = await run_load(target, mix.long_prompts(model), stop=stop, on_ended=end_on_failure)
        await asyncio.wait([streaming], timeout=_TAIL_S)
    finally:
        stop.set()
        streams = await streaming
    return Observation.of(streams, long_prompts, mix.num_streams)


def summarize(found: Interference) -> list[TableText]:
    """The tables of one server."""
    pairs = [(getattr(found.alone, name), getattr(found.loaded, name)) for name in ("p50", "p99", "max")]
    windows = (("alone", found.alone, found.alone_s), ("with long prompts", found.loaded, found.loaded_s))
    streams = [
        (name, *(f"{seconds * 1e3:.1f}" for seconds in (itl.p50, itl.p99, itl.max)), f"{itl.count}", f"{window_s:.1f}")
        for name, itl, window_s in windows
    ]
    streams.append(("ratio", *(f"{after / before:.2f}" if before else "" for before, after in pairs), "", ""))
    long_prompts = [(f"{index}", f"{ttft_s:.2f}") for index, ttft_s in enumerate(found.long_ttft_s, start=1)]
    long_prompts.append(("median", f"{found.long_ttft_p50_s:.2f}"))
    return [
        TableText(
            "Inter-token latency of the streams", ("", "p50 ms", "p99 ms", "max ms", "gaps", "window s"), streams
        ),
        TableText("Long prompts", ("", "TTFT s"), long_prompts),
    ]


def draw(observations: Mapping[str, Observation], *, title: str) -> Figure:
    """A timeline for each server: a dot for each gap where it ended, and the time that each long prompt took."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1 + 3.2 * len(observations)), layout="constrained")
    figure.suptitle(title)
    rows = figure.subplots(len(observations), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (name, seen) in zip(rows, observations.items(), strict=True):
        zero_s = seen.loaded_s[0]
        points = np.array([(end_s - zero_s, (end_s - start_s) * 1e3) for start_s, end_s in seen.gaps()]).reshape(-1, 2)
        for outcome in seen.long_prompts:
            ends_s = (outcome.scheduled_s + (outcome.ttft_s or 0.0), outcome.ended_s or outcome.scheduled_s)
            for end_s, alpha in zip(ends_s, (0.18, 0.08), strict=True):
                axes.axvspan(outcome.scheduled_s - zero_s, end_s - zero_s, color="tab:orange", alpha=alpha, lw=0)
        axes.plot(points[:, 0], points[:, 1], ".", markersize=3, color="tab:blue")
        axes.set_title(f"{name}: gaps of the streams; shaded: a long prompt, darker until its first token", fontsize=10)
        axes.set_ylabel("inter-token latency, ms")
        axes.grid(alpha=0.3)
    # When all is drawn: a limit that is set fixes the other one too.
    rows[0].set_ylim(bottom=0)
    rows[-1].set_xlabel("seconds after the first long prompt")
    return figure


_MIX = Mix()
_COUNT = click.IntRange(min=1)
_SECONDS = click.FloatRange(min=0, min_open=True)


@click.command()
@target_options
@click.option(
    "--streams",
    "num_streams",
    metavar="N",
    type=_COUNT,
    default=_MIX.num_streams,
    show_default=True,
    help="Answers under way at all times.",
)
@click.option(
    "--stream-input-tokens",
    metavar="N",
    type=_COUNT,
    default=_MIX.stream_input_tokens,
    show_default=True,
    help="Tokens of a stream's prompt.",
)
@click.option(
    "--stream-output-tokens",
    metavar="N",
    type=click.IntRange(min=2),
    default=_MIX.stream_output_tokens,
    show_default=True,
    help="Tokens of a stream's answer.",
)
@click.option(
    "--long-prompts",
    "num_long",
    metavar="N",
    type=_COUNT,
    default=_MIX.num_long,
    show_default=True,
    help="How many long prompts come.",
)
@click.option(
    "--long-input-tokens",
    metavar="N",
    type=_COUNT,
    default=_MIX.long_input_tokens,
    show_default=True,
    help="Tokens of a long prompt.",
)
@click.option(
    "--long-output-tokens",
    metavar="N",
    type=_COUNT,
    default=_MIX.long_output_tokens,
    show_default=True,
    help="Tokens of the answer to a long prompt.",
)
@click.option(
    "--interval-s",
    metavar="SECONDS",
    type=_SECONDS,
    default=_MIX.interval_s,
    show_default=True,
    help="From one long prompt to the next.",
)
@click.option(
    "--alone-s",
    metavar="SECONDS",
    type=_SECONDS,
    default=_MIX.alone_s,
    show_default=True,
    help="From the start of the streams to the first long prompt.",
)
@click.option(
    "--vocab-size",
    metavar="N",
    type=click.IntRange(min=2),
    help="Token ids of prompts are below this  [default: the model's over gRPC, else 1000]",
)
@click.option(
    "--seed",
    metavar="N",
    type=click.IntRange(min=0),
    default=_MIX.seed,
    show_default=True,
    help="The same seed sends the same requests.",
)
@report.output_options
def command(output: str | None, plot: str | None, **options: Any) -> None:
    """Measure what long prompts do to the streams of others.

    The streams run alone first, then beside long prompts. A gap between two tokens of a stream counts as alone when it
    lies between the first token of the last stream to begin and the arrival of the first long prompt; it counts as
    loaded when it overlaps the time from there to the end of the last long answer. No other gap counts, nor does the
    time from one answer of a stream to the next.
    """
    mix = Mix(**{field.name: options[field.name] for field in dataclasses.fields(Mix)})
    try:
        seen = uvloop.run(_observe(mix, options))
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    found = Interference.of(seen)
    tables = summarize(found)
    for table in tables:
        report.print_table(table)
    if output is not None:
        parameters = {"target": options["target"], **dataclasses.asdict(mix)}
        report.Report("interference", Provenance.collect(), parameters, found.to_json()).write(output)
    if plot is not None:
        title = f"{mix.num_long} prompts of {mix.long_input_tokens} tokens beside {mix.num_streams} streams"
        write_plot(plot, draw({options["target"]: seen}, title=title), title=title, tables=tables)


async def _observe(mix: Mix, options: Mapping[str, Any]) -> Observation:
    target = make_target(options)
    try:
        return await observe(target, mix)
    finally:
        await target.close()
