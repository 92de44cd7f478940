"""Runs Node programs with the packages of tests/node and the modules of examples/node beside them."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
from collections.abc import Mapping

from tests.tools import NODE_FOLDER, node

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
EXAMPLES = REPOSITORY / "examples" / "node"


def lay_out(folder: pathlib.Path) -> pathlib.Path:
    """The repository as an example sees it once its packages are installed; returns where the examples are."""
    programs = folder / "examples" / "node"
    shutil.copytree(EXAMPLES, programs, ignore=shutil.ignore_patterns("node_modules"))
    (programs / "node_modules").symlink_to(NODE_FOLDER / "node_modules")
    (folder / "proto").symlink_to(REPOSITORY / "proto")
    return programs


def run_node(program: pathlib.Path, *arguments: str, environment: Mapping[str, str]) -> str:
    """Runs a program in its own folder to its end, which must be a good one; returns what it printed."""
    result = subprocess.run(
        [node(), str(program), *arguments],
        cwd=program.parent,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
