"""Draws runs of load: how latencies are distributed, and how they and the throughput went over time.

matplotlib is of the extra `bench`, and is loaded only where a plot is asked for.
"""

from __future__ import annotations

import base64
import html
import importlib.util
import io
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click
import numpy as np

from bench.load.runner import LoadRun
from bench.report import TableText, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }}
img {{ width: 100%; }}
table {{ border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
</style>
<h1>{title}</h1>
<p><img alt="{title}" src="data:image/png;base64,{image}"></p>
{tables}
</html>
"""


def require_matplotlib() -> None:
    """Raises click.UsageError where plots cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise click.UsageError("plots need matplotlib: install Baton as pip install 'baton[bench]'")


def draw(runs: Mapping[str, LoadRun], *, title: str) -> Figure:
    """Four plots, with a line for each run: CDFs of TTFT and ITL, tokens each second, TTFT over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    figure.suptitle(title)
    (ttft, itl), (throughput, timeline) = figure.subplots(2, 2)
    for label, run in runs.items():
        complete = [outcome for outcome in run.outcomes if outcome.ok]
        _cdf(ttft, [outcome.ttft_s for outcome in complete if outcome.ttft_s is not None], label)
        _cdf(itl, [gap_s for outcome in complete for gap_s in outcome.itl_s], label)
        _tokens_each_second(throughput, run, label)
        firsts = [(outcome.scheduled_s - run.started_s, outcome.ttft_s) for outcome in complete if outcome.ttft_s]
        timeline.plot([at for at, _ in firsts], [ttft_s * 1e3 for _, ttft_s in firsts], ".", label=label)
    _label(ttft, "time to first token, ms", "share of requests")
    _label(itl, "inter-token latency, ms", "share of gaps")
    _label(throughput, "time, s", "output tokens/s")
    _label(timeline, "arrival, s", "time to first token, ms")
    if len(runs) > 1:
        ttft.legend()
    return figure


def write_plot(path: str | os.PathLike[str], figure: Figure, *, title: str, tables: Sequence[TableText] = ()) -> None:
    """Writes a figure as PNG, or, where `path` ends with .html, as one page with tables that needs no other file."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    content = image.getvalue()
    if os.fspath(path).endswith(".html"):
        content = _PAGE.format(
            title=html.escape(title),
            image=base64.b64encode(content).decode(),
            tables="\n".join(_html_table(table) for table in tables),
        ).encode()
    write_atomically(path, content)


def _cdf(axes: Axes, seconds: Sequence[float], label: str) -> None:
    values = np.sort(np.asarray(seconds)) * 1e3
    axes.plot(values, np.arange(1, len(values) + 1) / max(len(values), 1), drawstyle="steps-post", label=label)


def _tokens_each_second(axes: Axes, run: LoadRun, label: str) -> None:
    """Of the run's whole seconds and its last part, each as a rate."""
    times = np.array([at - run.started_s for outcome in run.outcomes for at in outcome.token_times_s])
    counts = np.array([count for outcome in run.outcomes for count in outcome.token_counts])
    edges = np.append(np.arange(0.0, run.duration_s, 1.0), run.duration_s)
    tokens, _ = np.histogram(times, edges, weights=counts)
    axes.stairs(tokens / np.diff(edges), edges, label=label)


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _html_table(table: TableText) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    lines = [line(table.columns, "th"), *(line(row, "td") for row in table.rows)]
    return "\n".join([f"<h2>{html.escape(table.title)}</h2>", "<table>", *lines, "</table>"])
