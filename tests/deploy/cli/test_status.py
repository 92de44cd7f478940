"""`baton status --watch`: the cluster as it changes."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator

import pytest
from rich.console import Console

from baton.client import Client, ClusterStatus, WorkerStatus
from baton.errors import UnavailableError
from baton.v1 import inference_pb2
from deploy.cli.status import StatusView, watch_status
from tests.baton.fake_inference import FakeInference, serving
from tests.deploy.cli.terminal import Terminal


@pytest.fixture
def server() -> Iterator[FakeInference]:
    with serving() as fake:
        fake.status = inference_pb2.GetClusterStatusResponse(model="demo", version="1", ready=True)
        yield fake


def worker(name: str, epoch: int) -> WorkerStatus:
    return WorkerStatus(
        role=name.partition("-")[0],
        name=name,
        epoch=epoch,
        address="127.0.0.1:1",
        metrics_address="127.0.0.1:2",
        pid=epoch,
        healthy=True,
        running=0,
        waiting=0,
        free_blocks=1,
        total_blocks=2,
    )


def status(*workers: WorkerStatus) -> ClusterStatus:
    return ClusterStatus(version="1", model="demo", ready=True, queued=0, running=0, workers=workers)


def shown(view: StatusView, now: float) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(view.render(now))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def ticks(*actions: Callable[[], object]) -> Callable[[float], object]:
    """A wait that does one thing each second, and is interrupted when there is no more."""
    left = iter(actions)

    def wait(seconds: float) -> object:
        assert seconds == 1.0
        for action in left:
            return action()
        raise KeyboardInterrupt

    return wait


class TestView:
    def test_a_worker_that_is_gone_is_dead_for_a_while(self) -> None:
        view = StatusView()
        view.update(status(worker("decode-0", 2), worker("prefill-0", 1)), now=0.0)
        view.update(status(worker("prefill-0", 1)), now=1.0)
        assert "dead 4 s" in shown(view, now=5.0)
        view.update(status(worker("prefill-0", 1), worker("decode-0", 3)), now=6.0)
        lines = [line.split() for line in shown(view, now=6.0).splitlines() if "-0" in line]
        assert [(line[0], line[2], line[-1]) for line in lines] == [
            ("prefill-0", "1", "healthy"),
            ("decode-0", "2", "s"),
            ("decode-0", "3", "healthy"),
        ]
        view.update(status(worker("decode-0", 3)), now=31.0)
        assert "dead 0 s" in shown(view, now=31.0)
        assert " 2 " not in next(line for line in shown(view, now=31.0).splitlines() if "decode-0" in line)

    def test_a_router_that_does_not_answer_leaves_the_last_status(self) -> None:
        view = StatusView()
        view.update(status(worker("decode-0", 2)), now=0.0)
        view.failed(UnavailableError("gone"))
        assert "decode-0" in shown(view, now=1.0)
        assert "no answer: gone" in shown(view, now=1.0)
        assert json.loads(view.as_json()) == {"error": "gone"}


def test_json_is_one_object_a_line(server: FakeInference, capsys: pytest.CaptureFixture[str]) -> None:
    def more() -> None:
        server.status = inference_pb2.GetClusterStatusResponse(model="demo", version="1", queued=3)

    with Client(server.target) as client:
        watch_status(client, as_json=True, wait=ticks(more))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["queued"] for line in lines] == [0, 3]


def test_without_a_terminal_each_table_is_printed(server: FakeInference) -> None:
    out = io.StringIO()
    with Client(server.target) as client:
        watch_status(client, as_json=False, console=Console(file=out), wait=ticks(lambda: None))
    assert out.getvalue().count("demo, Baton 1: ready") == 2


def test_a_table_that_lives_in_a_terminal(server: FakeInference) -> None:
    command = [sys.executable, "-P", "-m", "deploy.cli", "status", "--watch", "--target", server.target]
    with Terminal(command) as terminal:
        terminal.read_until("0 running, 0 queued")
        server.status = inference_pb2.GetClusterStatusResponse(model="demo", version="1", ready=False, queued=7)
        terminal.read_until("not ready, 0 running, 7 queued")
        terminal.interrupt()
        assert terminal.wait() == 0
