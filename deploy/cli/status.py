"""`baton status`: how the cluster stands, once or over and over, as a table or as JSON."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from baton.client import Client, ClusterStatus, WorkerStatus
from baton.errors import BatonError
from deploy.cli.report import status_table

INTERVAL_S = 1.0
# A worker that is no member any more is shown this long.
SHOWN_DEAD_S = 30.0

# Waits that long; a test's fake ends the watch.
Wait = Callable[[float], object]


def show(client: Client, *, as_json: bool) -> None:
    """Prints the status once.

    Raises:
        BatonError: the router does not answer.
    """
    status = client.status()
    if as_json:
        click.echo(json.dumps(as_dict(status)))
    else:
        Console().print(status_table(status))


def watch_status(client: Client, *, as_json: bool, console: Console | None = None, wait: Wait = time.sleep) -> None:
    """Shows the status every second until interrupted; a router that goes away is waited for.

    Raises:
        BatonError: the router does not answer the first time.
    """
    console = console or Console()
    view = StatusView()
    view.update(client.status(), time.monotonic())
    try:
        if as_json or not console.is_terminal:
            _print_each(client, view, console, wait, as_json=as_json)
        else:
            _show_live(client, view, console, wait)
    except KeyboardInterrupt:
        # The way to leave.
        return


class StatusView:
    """The last status, with the workers that have gone since it was first seen."""

    def __init__(self) -> None:
        self._status: ClusterStatus | None = None
        self._error = ""
        self._gone: dict[tuple[str, int], tuple[WorkerStatus, float]] = {}

    def update(self, status: ClusterStatus, now: float) -> None:
        """The router has answered."""
        present = {(worker.name, worker.epoch) for worker in status.workers}
        for worker in self._status.workers if self._status is not None else ():
            if (worker.name, worker.epoch) not in present:
                self._gone[worker.name, worker.epoch] = (worker, now)
        self._gone = {
            key: (worker, since)
            for key, (worker, since) in self._gone.items()
            if key not in present and now - since < SHOWN_DEAD_S
        }
        self._status, self._error = status, ""

    def failed(self, error: BatonError) -> None:
        """The router has not answered."""
        self._error = str(error)

    def as_json(self) -> str:
        """One line; what the router did not answer is an error."""
        if self._error or self._status is None:
            return json.dumps({"error": self._error})
        return json.dumps(as_dict(self._status))

    def render(self, now: float) -> RenderableType:
        assert self._status is not None
        table = status_table(self._status, dead=[(worker, now - since) for worker, since in self._gone.values()])
        return Group(table, Text(f"no answer: {self._error}", "red")) if self._error else table


def as_dict(status: ClusterStatus) -> dict[str, Any]:
    """The object that `--json` prints: the fields of `ClusterStatus`, with the workers in the order of the table."""
    return dataclasses.asdict(status)


def _poll(client: Client, view: StatusView) -> None:
    try:
        view.update(client.status(), time.monotonic())
    except BatonError as error:
        view.failed(error)


def _print_each(client: Client, view: StatusView, console: Console, wait: Wait, *, as_json: bool) -> None:
    while True:
        if as_json:
            click.echo(view.as_json())
        else:
            console.print(view.render(time.monotonic()))
        wait(INTERVAL_S)
        _poll(client, view)


def _show_live(client: Client, view: StatusView, console: Console, wait: Wait) -> None:
    with Live(view.render(time.monotonic()), console=console, auto_refresh=False) as live:
        while True:
            wait(INTERVAL_S)
            _poll(client, view)
            live.update(view.render(time.monotonic()), refresh=True)
