"""What `baton serve` tells while it starts."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from deploy.progress import Progress
from deploy.router_process import RouterAddresses


def test_steps_go_to_stderr_and_what_scripts_wait_for_to_stdout() -> None:
    out, err = io.StringIO(), io.StringIO()
    progress = Progress(Console(file=out), Console(file=err))
    progress.step("loading [model]")
    progress.ready(RouterAddresses(grpc="127.0.0.1:1", http="http://127.0.0.1:2"))
    progress.complete(2)
    assert err.getvalue().endswith(" s  loading [model]\n")
    ready, complete = out.getvalue().splitlines()
    assert ready.startswith("ready in ")
    assert ready.endswith(": gRPC 127.0.0.1:1, HTTP http://127.0.0.1:2")
    assert complete == "all 2 workers are up"


def test_steps_are_records_where_stderr_is_for_them(caplog: pytest.LogCaptureFixture) -> None:
    err = io.StringIO()
    with caplog.at_level(logging.INFO):
        Progress(Console(file=io.StringIO()), Console(file=err), as_records=True).step("starting Ray")
    assert (err.getvalue(), caplog.messages) == ("", ["starting Ray"])
