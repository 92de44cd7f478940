"""Programs that some tests need beside Python's: present they are used, absent the test skips and says so.

Where BATON_REQUIRE_TOOLS is set, as in .ci/run, an absent program is a failure.
"""

from __future__ import annotations

import os
import pathlib
import shutil
from typing import NoReturn

import pytest

NODE_FOLDER = pathlib.Path(__file__).parent / "node"


def tool(*names: str) -> str:
    """Path of the first program of these that is installed."""
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        absent(f"{' or '.join(names)} is not installed")
    return path


def node() -> str:
    """Path of Node, with the packages of tests/node beside it."""
    path = tool("node")
    if not (NODE_FOLDER / "node_modules").is_dir():
        absent("tests/node has no node_modules: run npm ci there")
    return path


def absent(reason: str) -> NoReturn:
    """Skips the test, or fails it where every tool is required."""
    if os.environ.get("BATON_REQUIRE_TOOLS"):
        pytest.fail(f"{reason}, and BATON_REQUIRE_TOOLS is set")
    pytest.skip(reason)
