"""docs/cli.md, made from the help of the commands: `python -m deploy.cli.reference` writes it anew."""

from __future__ import annotations

import inspect
import pathlib
from collections.abc import Iterator, Sequence

import click

from deploy.cli import commands

FILE = pathlib.Path(__file__).parents[2] / "docs" / "cli.md"

_HEAD = """\
# The command line

<!-- Made by `python -m deploy.cli.reference` from the commands' help; do not edit. -->

Exit codes: 0 done, 1 it failed, 2 the user can mend it, 130 interrupted. `baton serve` that is interrupted when it
has begun to serve drains and exits with 0, as on SIGTERM.

`baton generate --json` prints `request_id`, `text`, `finish_reason` (stop or length), `token_ids`, `usage`
(`prompt_tokens`, `cached_tokens`, `completion_tokens`) and `timings` (seconds of each stage, `attempts`,
`prefill_worker`, `decode_worker`). `baton status --json` prints `version`, `model`, `ready`, `queued`, `running` and
`workers`, a list of `role`, `name`, `epoch`, `address`, `metrics_address`, `pid`, `healthy`, `running`, `waiting`,
`free_blocks` and `total_blocks`; with `--watch` a line that the router did not answer has `error` alone.
"""


def render() -> str:
    """The page."""
    return "\n".join([_HEAD, f"{_text(commands.main.help)}\n", *_commands(commands.main, "baton", "##")])


def _commands(group: click.Group, path: str, heading: str) -> Iterator[str]:
    """The sections of a group's commands, those of a group among them one level down."""
    context = click.Context(group, info_name=path)
    for name in sorted(group.list_commands(context)):
        command = group.get_command(context, name)
        assert command is not None
        params = command.get_params(click.Context(command, info_name=name))
        arguments = [param.human_readable_name.upper() for param in params if isinstance(param, click.Argument)]
        arguments += ["COMMAND"] if isinstance(command, click.Group) else []
        table = _table(params)
        usage = " ".join([path, name, *arguments, *(["[OPTIONS]"] if table else [])])
        yield f"{heading} {path} {name}\n\n```text\n{usage}\n```\n\n{_text(command.help)}\n"
        if table:
            yield table
        if isinstance(command, click.Group):
            yield from _commands(command, f"{path} {name}", f"{heading}#")


def _table(params: Sequence[click.Parameter]) -> str:
    options = [param for param in params if isinstance(param, click.Option) and "--help" not in param.opts]
    if not options:
        return ""
    lines = ["| Option | What it does | Default |", "|---|---|---|"]
    for option in options:
        text, _, default = (option.help or "").partition("  [default: ")
        default = default.removesuffix("]") or (str(option.default) if option.show_default else "")
        if option.envvar:
            text += f" Also `{option.envvar}` in the environment."
        shown = f"`{default}`" if default and " " not in default else default
        lines.append(f"| `{_spelled(option)}` | {text} | {shown} |".replace("|  |", "| |"))
    return "\n".join(lines) + "\n"


def _spelled(option: click.Option) -> str:
    if option.is_flag:
        return option.opts[0]
    if isinstance(option.type, click.Choice):
        choices = "\\|".join(map(str, option.type.choices))
        return f"{option.opts[0]} {choices}"
    return f"{option.opts[0]} {option.metavar or option.type.name.upper()}"


def _text(text: str | None) -> str:
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in inspect.cleandoc(text or "").split("\n\n"))


if __name__ == "__main__":
    FILE.write_text(render(), encoding="utf-8")
