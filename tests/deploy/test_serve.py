"""How `baton serve` comes and goes, in real processes with fake workers and a fake router."""

from __future__ import annotations

import os
import pathlib
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.errors import ClusterError
from tests.cluster.harness import ClusterUnderTest

pytestmark = pytest.mark.clusters

REPOSITORY = pathlib.Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "tests.deploy.serve_fakes")
Start = Callable[..., ClusterUnderTest]


@pytest.fixture
def start(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts a cluster; its fake workers write to `tmp_path`. At the end nothing may be left of it."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    started: list[ClusterUnderTest] = []

    def start(
        behaviour: str = "fine",
        *flags: str,
        decode_workers: int = 1,
        stderr: int | None = None,
    ) -> ClusterUnderTest:
        cluster = ClusterUnderTest(
            tmp_path,
            *("--served-model-name", behaviour, *flags),
            decode_workers=decode_workers,
            command=COMMAND,
            stderr=stderr,
        )
        cluster.start()
        started.append(cluster)
        return cluster

    yield start
    for cluster in started:
        cluster.kill()


def wait_serving(target: str) -> None:
    with grpc.insecure_channel(target) as channel:
        request = health_pb2.HealthCheckRequest(service="baton.v1.Inference")
        for answer in health_pb2_grpc.HealthStub(channel).Watch(request, wait_for_ready=True):
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return


def test_the_ready_file_says_where_everything_is(start: Start) -> None:
    cluster = start(decode_workers=2)
    cluster.wait_ready()
    cluster.wait_complete()
    wait_serving(cluster.target)
    description = cluster.description
    assert [worker["name"] for worker in description["workers"]] == ["decode-0", "decode-1", "prefill-0"]
    assert set(description) == {"grpc", "http", "workers"}
    for worker in description["workers"]:
        assert set(worker) == {"role", "name", "pid", "address", "metrics"}
        assert psutil.pid_exists(worker["pid"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_the_workers_and_exits_with_0(start: Start, number: int, tmp_path: pathlib.Path) -> None:
    cluster = start()
    cluster.wait_ready()
    cluster.process.send_signal(number)
    assert cluster.process.wait() == 0
    assert 0 < float((tmp_path / "decode-0.drained").read_text()) <= 30
    assert (tmp_path / "prefill-0.stopped").exists()
    cluster.assert_nothing_left()


def test_the_ready_file_goes_with_the_cluster(start: Start, tmp_path: pathlib.Path) -> None:
    ready = tmp_path / "cluster.json"
    cluster = start("fine", "--ready-file", str(ready))
    cluster.wait_ready()
    assert ready.exists()
    cluster.process.send_signal(signal.SIGTERM)
    assert cluster.process.wait() == 0
    assert not ready.exists()


def test_a_second_signal_stops_at_once(start: Start, tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "decode-0.drained")
    cluster = start("never drains")
    cluster.wait_ready()
    cluster.process.send_signal(signal.SIGINT)
    (tmp_path / "decode-0.drained").read_text()
    cluster.process.send_signal(signal.SIGINT)
    assert cluster.process.wait() == 0
    assert not (tmp_path / "decode-0.stopped").exists()
    cluster.assert_nothing_left()


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_while_workers_start_leaves_nothing(
    start: Start, tmp_path: pathlib.Path, number: int, exit_code: int
) -> None:
    os.mkfifo(tmp_path / "prefill-0.started")
    cluster = start("hangs")
    assert psutil.pid_exists(int((tmp_path / "prefill-0.started").read_text()))
    cluster.process.send_signal(number)
    assert cluster.process.wait() == exit_code
    cluster.assert_nothing_left()


def test_an_interrupt_before_anything_has_started_is_quiet(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "baton.yaml")
    command = [sys.executable, "-P", "-m", "deploy.cli", "serve", "--config", str(tmp_path / "baton.yaml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        with open(tmp_path / "baton.yaml", "w"):
            # It reads its configuration now, and waits for more.
            process.send_signal(signal.SIGINT)
            assert process.communicate() == ("", "")
        assert process.returncode == 130


def test_killing_it_leaves_nothing(start: Start) -> None:
    """That of Ray's is in tests/cluster/test_lifecycle.py."""
    cluster = start()
    cluster.wait_ready()
    assert len(cluster.processes()) >= 4
    cluster.process.kill()
    cluster.process.wait()
    cluster.assert_nothing_left()


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("refuses", "-0: architecture 'bert' is not decoder-only"),
        ("dies", "-0 died while starting (exit status 3)"),
        ("router refuses", "the router died while starting (exit status 4)"),
    ],
)
def test_what_cannot_start_exits_with_2_and_one_line(
    start: Start, behaviour: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    cluster = start(behaviour)
    with pytest.raises(ClusterError, match="exit status 2"):
        cluster.wait_ready()
    stderr = capfd.readouterr().err
    assert stderr.splitlines()[-1].startswith("error: ")
    assert message in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    cluster.assert_nothing_left()


def test_a_port_in_use_exits_with_2(start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        cluster = start("fine", "--http-port", str(taken.getsockname()[1]))
        with pytest.raises(ClusterError, match="exit status 2"):
            cluster.wait_ready()
    assert "error: --http-port" in capfd.readouterr().err


def test_a_dead_router_comes_back_on_the_same_port(start: Start) -> None:
    cluster = start()
    cluster.wait_ready()
    target = cluster.target
    routers = [process for process in cluster.processes() if "tests.deploy.fake_router" in process.cmdline()]
    routers[0].kill()
    routers[0].wait()
    wait_serving(target)
    assert cluster.stop() == 0


def test_a_dead_worker_is_replaced_in_the_ready_file(start: Start) -> None:
    cluster = start(stderr=subprocess.PIPE)
    cluster.wait_ready()
    cluster.wait_complete()
    before = {worker["name"]: worker["pid"] for worker in cluster.description["workers"]}
    os.kill(before["decode-0"], signal.SIGKILL)
    assert cluster.process.stderr is not None
    assert any("decode-0 is up (epoch 3" in line for line in cluster.process.stderr)
    after = {worker["name"]: worker["pid"] for worker in cluster.description["workers"]}
    assert after["prefill-0"] == before["prefill-0"]
    assert after["decode-0"] != before["decode-0"]
