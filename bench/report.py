"""What every benchmark leaves behind: a `Report` as JSON, tables on the terminal, and the options for files."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click
from rich import box
from rich.console import Console
from rich.table import Table

from bench.provenance import Provenance

Command = TypeVar("Command", bound=Callable[..., Any])

_PLOT_SUFFIXES = (".png", ".html")
_FILE_WIDTH = 1000


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """One benchmark's outcome. `parameters` and `results` hold plain JSON values: nothing else is written.

    Attributes:
        name: of the benchmark, as `baton bench NAME`.
        parameters: what was asked for, with defaults resolved.
        results: what was measured; the names of numbers end with their unit.
    """

    name: str
    provenance: Provenance
    parameters: Mapping[str, Any]
    results: Mapping[str, Any]

    def to_json(self) -> str:
        """Raises ValueError for numbers that JSON does not have, such as NaN."""
        return json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False) + "\n"

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON so that whoever reads `path` sees all of it or what was there before."""
        write_atomically(path, self.to_json().encode())


def read_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object that `Report.write` wrote.

    Raises:
        click.UsageError: the file is no report.
    """
    try:
        found = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise click.UsageError(f"{os.fspath(path)}: no report of a benchmark: {error}") from error
    missing = [
        field.name for field in dataclasses.fields(Report) if not isinstance(found, dict) or field.name not in found
    ]
    if missing:
        raise click.UsageError(f"{os.fspath(path)}: no report of a benchmark: lacks {', '.join(missing)}")
    assert isinstance(found, dict)
    return found


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file beside `path`, then renames it."""
    target = pathlib.Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.absolute().parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        # mkstemp's files are private; a result is an ordinary file.
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


@dataclasses.dataclass(frozen=True, slots=True)
class TableText:
    """A table, each cell as it is shown."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def print_table(table: TableText) -> None:
    """Prints to stdout, in the look of Baton's other tables: the first column left, numbers right."""
    shown = Table(title=table.title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for index, column in enumerate(table.columns):
        shown.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in table.rows:
        shown.add_row(*row)
    console = Console()
    if not console.is_terminal:
        # No cell needs to be cut in a file; a table takes what it needs.
        console.width = _FILE_WIDTH
    console.print(shown, "")


def output_options(command: Command) -> Command:
    """Adds --output PATH.json and --plot PATH.png|.html, which come in as `output` and `plot`."""
    plot = click.option(
        "--plot", metavar="PATH", callback=_checked_plot, help="Draw the result into PATH (.png or .html)."
    )
    return json_option(plot(command))


def json_option(command: Command) -> Command:
    """Adds --output PATH.json alone, for results that are a table and no picture."""
    option = click.option(
        "--output", metavar="PATH", callback=_checked_folder, help="Write the result as JSON into PATH."
    )
    return option(command)


def _checked_folder(context: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """A missing folder is told before the benchmark runs, not after."""
    if value is not None and not pathlib.Path(value).absolute().parent.is_dir():
        raise click.BadParameter(f"{pathlib.Path(value).parent} is no folder", context, param)
    return value


def _checked_plot(context: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None:
        if not value.endswith(_PLOT_SUFFIXES):
            raise click.BadParameter(f"must end with {' or '.join(_PLOT_SUFFIXES)}, got {value!r}", context, param)
        from bench.plots import require_matplotlib

        require_matplotlib()
    return _checked_folder(context, param, value)
