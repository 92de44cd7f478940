"""`baton bench startup`: seconds from the command to the first request that could be served.

With each runtime, once with an empty cache of compiled kernels and then with the one that this has left. Ready is when
the ready file appears; the parts are what `baton serve` says of its steps.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import click

from bench import report
from bench.plots import write_plot
from bench.provenance import Provenance
from bench.report import TableText
from bench.servers import BATON_SERVE, Server, ServerSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Runtime = Literal["process", "ray"]

AIMS_S: Mapping[Runtime, float] = {"process": 8.0, "ray": 20.0}
"""Most seconds with kernels in the cache, the median of the rounds."""

_STEP = re.compile(r"^ *(?P<at_s>\d+\.\d) s  (?P<text>\S.*)$", re.MULTILINE)
_EPOCH = re.compile(r" \(epoch .*\)$")


@dataclasses.dataclass(frozen=True, slots=True)
class Start:
    """One start.

    Attributes:
        is_cold: whether the cache of compiled kernels was empty.
        ready_s: from the command to the ready file.
        steps: what `baton serve` said, with the seconds since its own start, which is after Python's imports.
        cpu_s: CPU seconds of all its processes until then.
    """

    runtime: Runtime
    is_cold: bool
    ready_s: float
    steps: tuple[tuple[float, str], ...]
    cpu_s: float

    @property
    def kind(self) -> str:
        return f"{self.runtime}, {'empty cache' if self.is_cold else 'cached kernels'}"


def measure(runtime: Runtime, model: pathlib.Path, kernels: pathlib.Path, *, timeout_s: float = 900.0) -> Start:
    """Starts a cluster with one worker of each kind, waits until it is ready, and ends it.

    Args:
        kernels: folder of compiled kernels; it is cold where this is empty.

    Raises:
        UnavailableError: it did not come up.
    """
    is_cold = not any(kernels.iterdir())
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        ready_file, log = pathlib.Path(folder, "ready.json"), pathlib.Path(folder, "log")
        flags = ("--runtime", runtime, "--ready-file", str(ready_file))
        spec = ServerSpec(f"baton, {runtime}", (*BATON_SERVE, *flags), {"NUMBA_CACHE_DIR": str(kernels)})
        with Server(spec, model, log, ready_timeout_s=timeout_s) as server:
            ready_s = server.wait_until(ready_file.exists)
            steps = read_steps(log.read_text(errors="replace"))
            return Start(runtime, is_cold, ready_s, steps, server.cpu_seconds())


def read_steps(log: str) -> tuple[tuple[float, str], ...]:
    """The steps in a log: when each was told, and its text without what differs from run to run."""
    return tuple((float(step["at_s"]), _EPOCH.sub("", step["text"])) for step in _STEP.finditer(log))


def by_kind(starts: Sequence[Start]) -> dict[str, list[Start]]:
    """The starts of each kind under its name, in the order of their first."""
    kinds: dict[str, list[Start]] = {}
    for start in starts:
        kinds.setdefault(start.kind, []).append(start)
    return kinds


def summarize(starts: Sequence[Start]) -> list[TableText]:
    """The medians of each kind of start, and the steps of its last one."""
    rows, steps = [], []
    for kind, own in by_kind(starts).items():
        seconds = [start.ready_s for start in own]
        aim_s = None if own[0].is_cold else AIMS_S[own[0].runtime]
        verdict = ("", "")
        if aim_s is not None:
            verdict = (f"<= {aim_s:g}", "pass" if statistics.median(seconds) <= aim_s else "miss")
        spread = f"{min(seconds):.1f} to {max(seconds):.1f}"
        cpu_s = statistics.median(start.cpu_s for start in own)
        rows.append((kind, f"{statistics.median(seconds):.1f}", spread, f"{cpu_s:.1f}", *verdict))
        steps += [(f"{kind}: {text}", f"{at_s:.1f}") for at_s, text in own[-1].steps]
    return [
        TableText("Ready to serve", ("", "s, median", "s, range", "CPU s", "aim", ""), rows),
        TableText("Steps of the last start of each kind", ("", "at s"), steps),
    ]


def draw(starts: Sequence[Start], *, title: str) -> Figure:
    """A bar for each kind of start at its median, a dot for each start, and a line where its aim is."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.5 + 0.6 * len(by_kind(starts))), layout="constrained")
    axes = figure.subplots()
    for place, (kind, own) in enumerate(by_kind(starts).items()):
        seconds = [start.ready_s for start in own]
        axes.barh(kind, statistics.median(seconds), alpha=0.35)
        axes.plot(seconds, [place] * len(own), "o", color="black", markersize=4)
        if not own[0].is_cold:
            axes.vlines(AIMS_S[own[0].runtime], place - 0.4, place + 0.4, color="tab:red")
    axes.set_title(title)
    axes.set_xlabel("seconds to ready; red: the aim")
    return figure


@click.command()
@click.option(
    "--model",
    required=True,
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=pathlib.Path),
    help="The checkpoint's directory.",
)
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    type=click.Choice(["process", "ray"]),
    default=("process", "ray"),
    show_default=True,
    help="May be given several times.",
)
@click.option(
    "--rounds",
    metavar="N",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Starts with cached kernels, after the one with an empty cache.",
)
@report.output_options
def command(
    model: pathlib.Path, runtimes: tuple[Runtime, ...], rounds: int, output: str | None, plot: str | None
) -> None:
    """Measure how long Baton takes from the command to the first request that it can serve.

    The kernels that are compiled for it go into a folder of their own, which ends with the measurement.
    """
    starts = []
    for runtime in runtimes:
        with tempfile.TemporaryDirectory(prefix="baton-bench-kernels-") as kernels:
            for _ in range(rounds + 1):
                starts.append(measure(runtime, model, pathlib.Path(kernels)))
                click.echo(f"{starts[-1].kind}: {starts[-1].ready_s:.1f} s", err=True)
    tables = summarize(starts)
    for table in tables:
        report.print_table(table)
    if output is not None:
        parameters: dict[str, Any] = {"model": str(model), "runtimes": list(runtimes), "rounds": rounds}
        results = {"starts": [dataclasses.asdict(start) for start in starts], "aims_s": dict(AIMS_S)}
        report.Report("startup", Provenance.collect(), parameters, results).write(output)
    if plot is not None:
        title = "From `baton serve` to the first request"
        write_plot(plot, draw(starts, title=title), title=title, tables=tables)
