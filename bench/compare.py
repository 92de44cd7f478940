"""`baton bench compare`: two servers on one machine, one at a time, round after round.

Each round starts both servers afresh, one after the other, and measures the same requests on each. The order turns
around from round to round (A B, B A, A B, …), so that what drifts with time (temperature, page cache, neighbours) falls
on both alike. Ratios are taken within a round; their median and range over the rounds are the result.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click
import uvloop

from bench import report
from bench.interference import Observation
from bench.interference import draw as draw_timelines
from bench.load.targets import open_target
from bench.plots import write_plot
from bench.provenance import Provenance
from bench.report import TableText
from bench.scenarios import SCENARIOS, Metric, Sample, Scenario
from bench.servers import Server, ServerSpec, parse_server

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FAIRNESS = (
    "One server at a time, on the same machine, with the same checkpoint, and a client of the same process.",
    "Each is sent the same token ids, lengths and times; answers are greedy and run past the end of sequence.",
    "Prompts are random and none is sent twice: a prefix cache helps neither, and the presets turn it off for both.",
    "Every server is warmed up before it is measured; starting it counts for nothing here.",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Visit:
    """One server in one round.

    Attributes:
        position: 0 for the server that came first in its round.
        ready_s: seconds from the start of the server until it was ready.
        cpu_s: CPU seconds of all its processes for each scenario, warm-up included.
        rss_bytes: resident memory of all its processes at the end.
    """

    server: str
    round: int
    position: int
    ready_s: float
    version: str | None
    samples: Mapping[str, Sample]
    cpu_s: Mapping[str, float]
    rss_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Everything but what is only drawn."""
        values = {name: dict(sample.values) for name, sample in self.samples.items()}
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, "samples": values, "cpu_s": dict(self.cpu_s)}


@dataclasses.dataclass(frozen=True, slots=True)
class Advantage:
    """How many times better the first server is by one metric, round by round.

    Attributes:
        first, second: the number of each server in each round.
    """

    scenario: str
    metric: Metric
    first: tuple[float, ...]
    second: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """One of each round; above 1 the first server is better."""
        return [self.metric.advantage(*pair) for pair in zip(self.first, self.second, strict=True)]

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    @property
    def meets_aim(self) -> bool | None:
        """Whether the median reaches the aim, or keeps to the limit; None where there is neither."""
        if self.metric.limit is not None:
            return statistics.median(self.first) <= self.metric.limit
        return None if self.metric.aim is None else self.median >= self.metric.aim

    def to_json(self) -> dict[str, Any]:
        return {
            "first": list(self.first),
            "second": list(self.second),
            "ratios": [_finite(ratio) for ratio in self.ratios],
            "ratio_median": _finite(self.median),
            "ratio_min": _finite(min(self.ratios)),
            "ratio_max": _finite(max(self.ratios)),
            "aim": self.metric.aim,
            "limit": self.metric.limit,
            "meets_aim": self.meets_aim,
        }


def order(num_rounds: int) -> Iterator[tuple[int, int, int]]:
    """Round, position within it and index of the server: A B, B A, A B, …"""
    for number in range(num_rounds):
        for position in (0, 1):
            yield number, position, (number + position) % 2


def compare(
    specs: Sequence[ServerSpec],
    scenarios: Mapping[str, Scenario],
    model: pathlib.Path,
    *,
    num_rounds: int,
    logs: pathlib.Path,
    tell: Callable[[str], None] = lambda text: None,
) -> list[Visit]:
    """Measures two servers in all rounds.

    Args:
        logs: folder for the logs of the servers.
        tell: is told of each step.

    Raises:
        BatonError: a server did not come up, or a request failed.
    """
    visits = []
    for number, position, index in order(num_rounds):
        spec = specs[index]
        with Server(spec, model, logs / f"{number + 1}-{spec.name}.log") as server:
            tell(f"round {number + 1} of {num_rounds}: {spec.name}: starting")
            ready_s = server.wait_ready()
            tell(f"round {number + 1} of {num_rounds}: {spec.name}: ready after {ready_s:.1f} s; measuring")
            visits.append(_visit(server, scenarios, number, position, ready_s))
    return visits


def _visit(server: Server, scenarios: Mapping[str, Scenario], number: int, position: int, ready_s: float) -> Visit:
    samples, cpu_s = {}, {}
    for name, scenario in scenarios.items():
        before_s = server.cpu_seconds()
        samples[name] = uvloop.run(_sample(server.url, scenario))
        cpu_s[name] = server.cpu_seconds() - before_s
    return Visit(server.spec.name, number, position, ready_s, server.version(), samples, cpu_s, server.rss_bytes())


async def _sample(url: str, scenario: Scenario) -> Sample:
    target = open_target(url)
    try:
        # The target learns the model's name.
        await target.served_model()
        return await scenario.run(target)
    finally:
        await target.close()


def advantages(visits: Sequence[Visit], names: tuple[str, str], scenarios: Mapping[str, Scenario]) -> list[Advantage]:
    """The first server against the second, by every metric of every scenario."""

    def values(server: str, scenario: str, metric: str) -> tuple[float, ...]:
        own = sorted((visit for visit in visits if visit.server == server), key=lambda visit: visit.round)
        return tuple(visit.samples[scenario].values[metric] for visit in own)

    first, second = names
    return [
        Advantage(name, metric, values(first, name, metric.name), values(second, name, metric.name))
        for name, scenario in scenarios.items()
        for metric in scenario.metrics
    ]


def summarize(found: Sequence[Advantage], visits: Sequence[Visit], names: tuple[str, str]) -> list[TableText]:
    """A table for each scenario, and one of what the servers took."""
    tables: list[TableText] = []
    columns = ("", *names, "ratio", "range", "aim", "")
    for scenario in dict.fromkeys(each.scenario for each in found):
        rows = [_row(each) for each in found if each.scenario == scenario]
        tables.append(TableText(f"{scenario}: medians, and how many times better {names[0]} is", columns, rows))
    costs = []
    for name in names:
        own = [visit for visit in visits if visit.server == name]
        costs.append(
            (
                f"{name} {own[0].version or ''}".strip(),
                f"{statistics.median(visit.ready_s for visit in own):.1f}",
                f"{statistics.median(sum(visit.cpu_s.values()) for visit in own):.1f}",
                f"{statistics.median(visit.rss_bytes for visit in own) / (1 << 20):.0f}",
            )
        )
    tables.append(TableText("What the servers took: medians", ("", "s to ready", "CPU s", "RSS MiB"), costs))
    return tables


def _row(each: Advantage) -> tuple[str, ...]:
    metric, ratios = each.metric, each.ratios
    aim = (
        f">= {metric.aim:g} x" if metric.aim is not None else f"<= {metric.limit:g}" if metric.limit is not None else ""
    )
    verdict = {None: "", True: "pass", False: "miss"}[each.meets_aim]
    medians = (f"{statistics.median(values) * metric.scale:.4g}" for values in (each.first, each.second))
    spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
    return (metric.label, *medians, f"{each.median:.2f}", spread, aim, verdict)


def draw(found: Sequence[Advantage], names: tuple[str, str], *, title: str) -> Figure:
    """A panel for each metric: a dot for each round of each server, and a bar at the median."""
    from matplotlib.figure import Figure

    num_columns = min(3, len(found))
    num_rows = -(-len(found) // num_columns)
    figure = Figure(figsize=(11, 1 + 2.6 * num_rows), layout="constrained")
    figure.suptitle(title)
    panels = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
    for axes, each in zip(panels, found, strict=False):
        for place, values in enumerate((each.first, each.second)):
            scaled = [value * each.metric.scale for value in values]
            axes.bar(place, statistics.median(scaled), width=0.6, alpha=0.35)
            axes.plot([place] * len(scaled), scaled, "o", color="black", markersize=4)
        axes.set_xticks([0, 1], names)
        better = "more" if each.metric.higher_is_better else "less"
        axes.set_title(f"{each.metric.label} ({better} is better)", fontsize=9)
        axes.set_ylim(bottom=0)
    for axes in panels[len(found) :]:
        axes.set_visible(False)
    return figure


def _finite(number: float) -> float | None:
    """JSON has no infinity: a server that reached nothing at all has no ratio."""
    return number if abs(number) < float("inf") else None


def _vocab_size(model: pathlib.Path) -> int:
    try:
        return int(json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise click.UsageError(f"--model {model}: no checkpoint whose config.json tells vocab_size: {error}") from error


@click.command()
@click.option(
    "--model",
    required=True,
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=pathlib.Path),
    help="The checkpoint that both serve, such as one of `baton bench checkpoint`.",
)
@click.option(
    "--server",
    "servers",
    multiple=True,
    required=True,
    metavar="[NAME=]COMMAND",
    help="Given twice: a preset (baton, vllm) with further flags, or a command with {model} and {port} in it.",
)
@click.option(
    "--scenario",
    "names",
    multiple=True,
    type=click.Choice([*SCENARIOS]),
    help="What is measured; may be given several times  [default: all]",
)
@click.option(
    "--rounds",
    metavar="N",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="How often each server is started and measured.",
)
@click.option(
    "--share",
    metavar="X",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Sends X times as many requests; below 1 for a trial.",
)
@click.option(
    "--peer-python",
    metavar="PATH",
    type=click.Path(exists=True, dir_okay=False),
    help="The interpreter of the environment that has vLLM.",
)
@click.option(
    "--logs",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=pathlib.Path),
    help="Keep the logs of the servers in DIR.",
)
@report.output_options
def command(
    model: pathlib.Path,
    servers: tuple[str, ...],
    names: tuple[str, ...],
    rounds: int,
    share: float,
    peer_python: str | None,
    logs: pathlib.Path | None,
    output: str | None,
    plot: str | None,
) -> None:
    """Compare two servers on this machine, alternating, with the same checkpoint and the same requests.

    A ratio above 1 says by which factor the first server is better; where something is aimed at, "pass" or "miss" says
    whether the median over the rounds reaches it. The plot of scenario interference has a timeline of the last round
    beside it, in PATH with -timeline before its suffix.
    """
    specs = [parse_server(text, peer_python=peer_python) for text in servers]
    if len(specs) != 2 or specs[0].name == specs[1].name:
        raise click.UsageError("--server: must be given twice, with two names")
    vocab_size = _vocab_size(model)
    chosen = {name: SCENARIOS[name].scaled(share, vocab_size=vocab_size) for name in names or SCENARIOS}
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        visits = compare(
            specs,
            chosen,
            model,
            num_rounds=rounds,
            logs=logs or pathlib.Path(folder),
            tell=lambda text: click.echo(text, err=True),
        )
    pair = (specs[0].name, specs[1].name)
    found = advantages(visits, pair, chosen)
    tables = summarize(found, visits, pair)
    for name, scenario in chosen.items():
        click.echo(f"{name}: {scenario.help}")
    for table in tables:
        report.print_table(table)
    if output is not None:
        parameters = {
            "model": str(model),
            "servers": {spec.name: spec.shell_line() for spec in specs},
            "scenarios": {name: scenario.help for name, scenario in chosen.items()},
            "rounds": rounds,
            "share": share,
            "fairness": list(FAIRNESS),
        }
        _write(output, parameters, found, visits)
    if plot is not None:
        title = f"{pair[0]} and {pair[1]}: medians, and a dot for each round"
        write_plot(plot, draw(found, pair, title=title), title=title, tables=tables)
        _plot_timelines(plot, visits)


def _write(output: str, parameters: dict[str, Any], found: Sequence[Advantage], visits: Sequence[Visit]) -> None:
    ratios: dict[str, dict[str, Any]] = {}
    for each in found:
        ratios.setdefault(each.scenario, {})[each.metric.name] = each.to_json()
    results = {"advantages": ratios, "visits": [visit.to_json() for visit in visits]}
    report.Report("compare", Provenance.collect(), parameters, results).write(output)


def _plot_timelines(plot: str, visits: Sequence[Visit]) -> None:
    """Draws the last round of what has a timeline, beside `plot`."""
    last: dict[str, Observation] = {}
    for visit in visits:
        for sample in visit.samples.values():
            if sample.observation is not None:
                last[visit.server] = sample.observation
    if last:
        path = pathlib.Path(plot)
        title = "What long prompts do to the streams of others"
        write_plot(path.with_stem(f"{path.stem}-timeline"), draw_timelines(last, title=title), title=title)
