"""What the pages mention in passing exists: commands, flags, settings, variables, series, files of the repository."""

from __future__ import annotations

import importlib.util
import pathlib
import re
from collections.abc import Callable, Iterator

import click
import pytest

from deploy.cli import commands
from deploy.settings import environment, schema
from tests.docs.markdown import DOCS, PAGES, REPOSITORY, prose

CODE = re.compile(r"`([^`]+)`")


def options_of_commands(group: click.Group, path: str = "") -> Iterator[tuple[str, set[str]]]:
    """Each command of a group and of those in it, as it is typed, with its flags."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        parameters = command.get_params(click.Context(command))
        yield path + name, {"--help", *(o for each in parameters for o in each.opts + each.secondary_opts)}
        if isinstance(command, click.Group):
            yield from options_of_commands(command, f"{path}{name} ")


COMMANDS = dict(options_of_commands(commands.main))
FLAGS = set.union(*COMMANDS.values()) | {"--version"}
SERIES = set(re.findall(r"`(baton_\w+)`", (DOCS / "metrics.md").read_text()))
# Of other programs, or of what Baton's users write themselves.
FOREIGN_FLAGS = re.compile(
    r"--(config\.file|gpus|ipc|shm-size|rm|head|labels|resources|num-gpus|num-cpus|address|port|node-ip-address|dashboard-host|block)\b"
)


def relative(page: pathlib.Path) -> str:
    return str(page.relative_to(REPOSITORY))


def mentions(page: pathlib.Path) -> list[str]:
    """The code in the lines of a page, generated tables included."""
    return [code for line in prose(page) for code in CODE.findall(line)]


def is_command(code: str) -> bool:
    """`baton NAME ...` names a command and its flags."""
    match = re.match(r"(?:\.venv/bin/)?baton (bench [a-z]+|[a-z]+)\b(.*)", code)
    if match is None:
        return True
    flags = re.findall(r"(?<!\S)--[\w-]+", match[2])
    return match[1] in COMMANDS and set(flags) <= COMMANDS[match[1]]


def is_flag(code: str) -> bool:
    """`--flag` is one of some command."""
    return not re.match(r"--[a-z]", code) or re.split(r"[ =]", code)[0] in FLAGS or bool(FOREIGN_FLAGS.match(code))


def is_setting(code: str) -> bool:
    """`section.name` is a place in the configuration."""
    path = tuple(re.split(r"[:= ]", code)[0].split("."))
    if path[:1] not in schema.sections() or not all(name.isidentifier() for name in path) or len(path) == 1:
        return True
    return path in schema.values() or path in schema.sections()


def is_variable(code: str) -> bool:
    """`BATON_NAME` sets something, or is read by something."""
    match = re.match(r"BATON_[A-Z_0-9]+", code)
    return match is None or code == "BATON_" or not environment.unknown_variables({match[0]: "1"})


def is_series(code: str) -> bool:
    """`baton_name` is a series, or one of a histogram's."""
    match = re.match(r"baton_[a-z0-9_]+(?![*])", code)
    return (
        match is None
        or match[0].endswith("_")
        or bool({match[0], re.sub(r"_(sum|count|bucket)$", "", match[0])} & SERIES)
    )


def is_make_target(code: str) -> bool:
    """`make target` is in the Makefile."""
    match = re.match(r"make (\w+)$", code)
    return match is None or f"\n{match[1]}:" in (REPOSITORY / "Makefile").read_text()


def is_module(code: str) -> bool:
    """`python -m module` can be run."""
    match = re.match(r"(?:\.venv/bin/)?python -m ([\w.]+)", code)
    return match is None or importlib.util.find_spec(match[1]) is not None


CHECKS = [is_command, is_flag, is_setting, is_variable, is_series, is_make_target, is_module]


@pytest.mark.parametrize("exists", CHECKS)
@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_names_exist(page: pathlib.Path, exists: Callable[[str], bool]) -> None:
    assert [code for code in mentions(page) if not exists(code)] == []


def test_the_checks_can_fail() -> None:
    assert not is_command("baton fly --high")
    assert not is_command("baton status --nothing")
    assert not is_command("baton bench nothing")
    assert not is_flag("--no-such-flag")
    assert not is_setting("router.nothing")
    assert not is_variable("BATON_NOTHING")
    assert not is_series("baton_nothing_total")
    assert not is_make_target("make nothing")
    assert not is_module("python -m baton.nothing")
