"""Requests and clusters in words, for the command line and the tour."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from baton.client import ClusterStatus, StageTimings, Usage, WorkerStatus


def describe_request(usage: Usage, timings: StageTimings) -> str:
    """One line: tokens, then the time of each stage, then who did it."""
    stages = [
        ("queue", timings.queue_s),
        ("reserve", timings.reserve_s),
        ("prefill", timings.prefill_s),
        ("transfer", timings.transfer_s),
        ("first step", timings.first_decode_step_s),
        ("decode", timings.decode_s),
    ]
    tokens = f"{usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached), {usage.completion_tokens} generated"
    times = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in stages)
    return f"{tokens} | {times} | {_route(timings)}"


def _route(timings: StageTimings) -> str:
    if timings.local_prefill or not timings.prefill_worker:
        route = f"{timings.decode_worker}, prefilled in place"
    else:
        route = f"{timings.prefill_worker} -> {timings.decode_worker}"
    return route if timings.attempts <= 1 else f"{route} ({timings.attempts} attempts)"


def status_table(status: ClusterStatus, dead: Sequence[tuple[WorkerStatus, float]] = ()) -> Table:
    """The workers, under a title that tells of the router; it fits into 80 columns.

    Args:
        dead: workers that were there before, with the seconds since they are gone.
    """
    state = "[green]ready[/green]" if status.ready else "[yellow]not ready[/yellow]"
    table = Table(
        title=f"{status.model}, Baton {status.version}: {state}, {status.running} running, {status.queued} queued",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    for column in ("worker", "address"):
        table.add_column(column, no_wrap=True)
    for column in ("epoch", "pid", "run", "wait", "KV blocks"):
        table.add_column(column, justify="right")
    table.add_column("state")
    # The order of a request's way: prefill before decode.
    rows = [(worker, _state(worker)) for worker in status.workers]
    rows += [(worker, f"[red]dead[/red] {seconds:.0f} s") for worker, seconds in dead]
    for worker, text in sorted(rows, key=lambda row: (row[0].role != "prefill", row[0].name, row[0].epoch)):
        table.add_row(*_cells(worker), text)
    return table


def _state(worker: WorkerStatus) -> str:
    return "[green]healthy[/green]" if worker.healthy else "[red]unreachable[/red]"


def _cells(worker: WorkerStatus) -> tuple[str, ...]:
    return (
        worker.name,
        worker.address,
        str(worker.epoch),
        str(worker.pid),
        str(worker.running),
        str(worker.waiting),
        f"{worker.total_blocks - worker.free_blocks}/{worker.total_blocks}",
    )
