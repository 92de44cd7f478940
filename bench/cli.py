"""`baton bench`: a group whose commands are imported when they are called, since some of them load torch."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

import click

from baton.errors import BatonError


@dataclasses.dataclass(frozen=True, slots=True)
class Lazy:
    """Where a command is, as "module:name", and the line about it that the group's help shows."""

    target: str
    help: str

    def load(self) -> click.Command:
        module, _, name = self.target.partition(":")
        command = getattr(importlib.import_module(module), name)
        assert isinstance(command, click.Command), self.target
        return command


COMMANDS: Mapping[str, Lazy] = {
    "checkpoint": Lazy("bench.checkpoint:command", "Write a random checkpoint that every server can load."),
    "compare": Lazy("bench.compare:command", "Compare two servers on this machine, alternating."),
    "engine": Lazy("bench.engine:command", "Measure prefill and decode against the machine's limits."),
    "interference": Lazy("bench.interference:command", "Measure what long prompts do to the streams of others."),
    "kernels": Lazy("bench.kernels:command", "Measure attention against the machine's limits."),
    "router": Lazy("bench.router.command:command", "Measure what the router adds, in front of mock workers."),
    "startup": Lazy("bench.startup:command", "Measure how long `baton serve` takes until it is ready."),
    "serve": Lazy("bench.serve:command", "Load a server with requests and measure its latencies and throughput."),
    "transfer": Lazy("bench.transfer:command", "Measure the transports between two processes of this host."),
}


class BenchGroup(click.Group):
    """A group over a table of lazy commands; what goes wrong at run time is one line and the exit code 1."""

    def __init__(self, commands: Mapping[str, Lazy], **attributes: Any) -> None:
        super().__init__(**attributes)
        self._lazy = commands

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return self._lazy[cmd_name].load() if cmd_name in self._lazy else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Shows the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, self._lazy[name].help) for name in self.list_commands(ctx)])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BatonError as error:
            raise click.ClickException(str(error)) from error


bench = BenchGroup(
    COMMANDS,
    name="bench",
    help="Measure a server, or a part of Baton.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
