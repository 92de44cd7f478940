"""`baton bench serve`: loads a server and tells what its clients see.

For Baton and for any other server with OpenAI's API, in the same way, so that they can be compared.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import click
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import report
from bench.load.load import Load
from bench.load.measurement import Measured, measure
from bench.load.measures import Objectives
from bench.load.options import (
    load_options,
    make_load,
    make_objectives,
    make_target,
    objective_options,
    target_options,
)
from bench.load.outcome import Outcome
from bench.load.runner import LoadRun, OnEnded
from bench.load.summary import summarize
from bench.plots import draw, write_plot
from bench.provenance import Provenance

EXIT_INTERRUPTED = 130
# Drawing takes time from the generator, which shares its thread's lock.
_REFRESHES_PER_S = 2
# From this share of a core on the generator may be what is measured.
_BUSY_CLIENT = 0.8


@click.command()
@target_options
@load_options
@objective_options
@click.option("--details", is_flag=True, help="Write the times of every request into --output too.")
@report.output_options
def command(details: bool, output: str | None, plot: str | None, **options: Any) -> None:
    """Load a server with requests and measure what its clients see.

    Works on Baton and on any other server with OpenAI's API. Requests arrive at a --rate (open loop), at the times of a
    trace, or as others end (--concurrency). Answers are greedy and go past the end of sequence. Latencies count from
    when a request was due, whether or not it could be sent then. Ctrl-C ends the load and shows what was measured.
    """
    try:
        load = make_load(options)
        measured = uvloop.run(_measure(load, make_objectives(options), options))
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    tables = summarize(measured)
    for table in tables:
        report.print_table(table)
    for warning in warnings_about(measured):
        click.echo(f"warning: {warning}", err=True)
    if output is not None:
        results = measured.to_json() | ({"requests": requests_json(measured.run)} if details else {})
        parameters = {
            "target": options["target"],
            "continuous_usage": options["continuous_usage"],
            "slo_ttft_ms": options["slo_ttft_ms"],
            "slo_tpot_ms": options["slo_tpot_ms"],
            **load.to_json(),
        }
        report.Report("serve", Provenance.collect(), parameters, results).write(output)
    if plot is not None:
        title = f"{measured.model.name} at {options['target']}: {load.workload}"
        write_plot(plot, draw({measured.model.name: measured.run}, title=title), title=title, tables=tables)
    if measured.run.interrupted:
        raise SystemExit(EXIT_INTERRUPTED)


async def _measure(load: Load, objectives: Objectives | None, options: dict[str, Any]) -> Measured:
    target = make_target(options)
    try:
        with _shown_progress() as progress:
            return await measure(target, load, objectives=objectives, progress=progress)
    finally:
        await target.close()


def requests_json(run: LoadRun) -> list[dict[str, Any]]:
    """Each request of a run; times are seconds from its start."""

    def since_start(at_s: float | None) -> float | None:
        return None if at_s is None else round(at_s - run.started_s, 6)

    return [
        {
            "scheduled_s": since_start(outcome.scheduled_s),
            "sent_s": since_start(outcome.sent_s),
            "token_times_s": [since_start(at_s) for at_s in outcome.token_times_s],
            "token_counts": outcome.token_counts,
            "ended_s": since_start(outcome.ended_s),
            "prompt_tokens": outcome.prompt_tokens,
            "cached_tokens": outcome.cached_tokens,
            "output_tokens": outcome.output_tokens,
            "error": outcome.error,
            "error_message": outcome.error_message,
        }
        for outcome in run.outcomes
    ]


def warnings_about(measured: Measured) -> Iterator[str]:
    """What a reader of the numbers should know."""
    if measured.client_cpu_share > _BUSY_CLIENT:
        yield f"this generator took {measured.client_cpu_share:.0%} of a core; it may be what was measured"
    measures = measured.measures
    if measures.counted_tokens < measures.output_tokens:
        yield (
            f"the events tell of {measures.counted_tokens} tokens, the usage of {measures.output_tokens}: the server "
            "puts several into one event; --continuous-usage counts them"
        )
    messages = Counter((outcome.error, outcome.error_message) for outcome in measured.run.outcomes if outcome.error)
    for (error, message), count in messages.most_common(3):
        yield f"{count} requests ended by {error}: {message}"


@contextlib.contextmanager
def _shown_progress() -> Iterator[Callable[[int], OnEnded]]:
    """A bar on a terminal's stderr that goes away; gives what `measure` takes."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns,
        console=console,
        transient=True,
        refresh_per_second=_REFRESHES_PER_S,
        disable=not console.is_terminal,
    ) as bar:

        def begin(num_answers: int) -> OnEnded:
            task = bar.add_task("answers", total=num_answers)
            num_failed = itertools.count(1)

            def ended(outcome: Outcome) -> None:
                bar.advance(task)
                if not outcome.ok:
                    bar.update(task, description=f"answers, {next(num_failed)} failed")

            return ended

        yield begin
