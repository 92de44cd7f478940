"""The live page in a real browser, on a real cluster; tests/node/page.mjs holds what is checked."""

from __future__ import annotations

import json
import re

import pytest

from tests.cluster.harness import ClusterUnderTest
from tests.node_programs import run_node
from tests.tools import NODE_FOLDER, tool

PROGRAM = NODE_FOLDER / "page.mjs"
CHECKS = re.findall(r'^  async "(.+)"\(', PROGRAM.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def outcomes(demo_cluster: ClusterUnderTest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What went wrong in each check, all in one browser; empty where nothing did."""
    profile = str(tmp_path_factory.mktemp("chromium"))
    browser = tool("chromium", "chromium-browser", "google-chrome")
    printed = run_node(PROGRAM, browser, demo_cluster.url, environment={"TMPDIR": profile})
    loaded = json.loads(printed)
    assert isinstance(loaded, dict)
    return loaded


@pytest.mark.parametrize("check", CHECKS)
def test_the_page(outcomes: dict[str, str], check: str) -> None:
    assert outcomes[check] == ""
