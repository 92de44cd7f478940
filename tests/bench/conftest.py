"""A fake server of OpenAI's API for the tests that load one."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Iterator

import pytest

from bench.servers import Server, ServerSpec

FAKE_SERVER = pathlib.Path(__file__).with_name("fake_openai.py")


def fake_spec(name: str, *flags: str) -> ServerSpec:
    return ServerSpec(name, (sys.executable, str(FAKE_SERVER), "{port}", *flags), ready_path="/health")


@pytest.fixture(scope="module")
def fake_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("fake")
    with Server(fake_spec("fake", "--refuse", "13"), folder, folder / "log") as server:
        server.wait_ready()
        yield server
