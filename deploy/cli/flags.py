"""The flags of `baton serve`, made from the settings when they are first asked for: other commands start without."""

from __future__ import annotations

import functools
from typing import Any

import click

METAVARS = {"integer": "N", "number": "SECONDS", "array": "A,B"}
# Where the kind of a value says less than this.
_METAVAR_OF_FLAG = {
    "--model": "DIR",
    "--served-model-name": "NAME",
    "--host": "ADDR",
    "--worker-host": "ADDR",
    "--ray-address": "ADDR",
    "--grpc-port": "PORT",
    "--http-port": "PORT",
    "--gpu-memory-utilization": "SHARE",
    "--ready-file": "PATH",
    "--tls-cert-file": "PATH",
    "--tls-key-file": "PATH",
    "--tool-call-format": "NAME",
    "--reasoning-format": "NAME",
}


class SettingsCommand(click.Command):
    """A command with a flag for each of `settings.FLAGS`, before its own options."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*_flags(), *super().get_params(ctx)]


def given(context: click.Context) -> dict[str, Any]:
    """The flags that were given, with their values."""
    from deploy import settings
    from deploy.settings import environment, schema

    found: dict[str, Any] = {}
    for flag, path in settings.FLAGS.items():
        value = context.params.pop(_parameter(flag), None)
        if value is not None:
            definition = schema.values()[path]
            found[flag] = environment.parse(definition, value) if definition.kind in ("array", "object") else value
    return found


@functools.cache
def _flags() -> tuple[click.Parameter, ...]:
    from deploy import settings
    from deploy.settings import schema

    return tuple(_option(flag, schema.values()[path]) for flag, path in settings.FLAGS.items())


def _option(flag: str, value: Any) -> click.Option:
    names = [flag, _parameter(flag)]
    if value.kind == "boolean":
        names = [f"{flag}/--no-{flag.removeprefix('--')}", _parameter(flag)]
    kind: Any = {"integer": int, "number": float, "boolean": bool}.get(value.kind, str)
    # Numbers that are choices are validated with everything else.
    if value.choices and value.kind == "string":
        kind = click.Choice(value.choices)
    return click.Option(
        names,
        type=kind,
        default=None,
        metavar=_METAVAR_OF_FLAG.get(flag, None if value.choices and kind is not int else METAVARS.get(value.kind)),
        help=f"{value.description}{_default(value)}",
    )


def _parameter(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _default(value: Any) -> str:
    default = value.default
    if default is None or default == "":
        return ""
    shown = (
        ",".join(default)
        if isinstance(default, list)
        else str(default).lower()
        if default in (True, False)
        else default
    )
    return f"  [default: {shown}]"
