"""How a real cluster comes and goes, in both runtimes: real command, router and workers on a tiny checkpoint."""

from __future__ import annotations

import os
import pathlib
import signal
import socket
from typing import Literal

import psutil
import pytest

from baton.client import Client
from deploy.errors import ClusterError
from tests.cluster.harness import ClusterUnderTest, running_cluster
from tests.engine.checkpoints import make_checkpoint

Runtime = Literal["process", "ray"]
RUNTIMES: tuple[Runtime, ...] = ("process", "ray")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("llama")
    make_checkpoint("llama", folder)
    return folder


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_cluster_serves_and_sigterm_leaves_nothing(checkpoint: pathlib.Path, runtime: Runtime) -> None:
    with running_cluster(checkpoint, runtime=runtime) as cluster:
        description = cluster.description
        assert {worker["role"] for worker in description["workers"]} == {"prefill", "decode"}
        with Client(description["grpc"]) as client:
            completion = client.generate(list(range(3, 67)), max_tokens=8, temperature=0, ignore_eos=True)
            assert len(completion.choices[0].token_ids) == 8
            assert (completion.timings.prefill_worker, completion.timings.decode_worker) == ("prefill-0", "decode-0")
            pids = {worker.name: worker.pid for worker in client.status().workers}
        assert pids == {worker["name"]: worker["pid"] for worker in description["workers"]}


def test_sigterm_lets_a_running_request_end(checkpoint: pathlib.Path) -> None:
    with running_cluster(checkpoint) as cluster, Client(cluster.target) as client:
        stream = client.stream(list(range(3, 67)), max_tokens=200, temperature=0, ignore_eos=True)
        next(stream)
        cluster.process.send_signal(signal.SIGTERM)
        last = None
        for delta in stream:
            last = delta
        assert last is not None
        assert last.usage is not None
        assert last.usage.completion_tokens == 200


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_killing_the_command_leaves_nothing(checkpoint: pathlib.Path, runtime: Runtime) -> None:
    cluster = ClusterUnderTest(checkpoint, runtime=runtime)
    cluster.start()
    try:
        cluster.wait_ready()
        workers = [psutil.Process(worker["pid"]) for worker in cluster.description["workers"]]
        cluster.process.kill()
        _, alive = psutil.wait_procs(workers, timeout=5)
        assert alive == []
        cluster.assert_nothing_left()
    finally:
        cluster.close()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_ctrl_c_while_it_starts_leaves_nothing(checkpoint: pathlib.Path, runtime: Runtime) -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading) as steps:
        cluster = ClusterUnderTest(checkpoint, runtime=runtime, stderr=writing)
        cluster.start()
        os.close(writing)
        try:
            assert any("loading model" in line for line in steps)
            cluster.process.send_signal(signal.SIGINT)
            assert cluster.process.wait() == 0
            cluster.assert_nothing_left()
        finally:
            cluster.close()


def test_a_model_that_is_not_decoder_only_is_refused(tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert_refused(ClusterUnderTest(tmp_path))
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert "bert" in error.splitlines()[-1].lower()


def test_too_little_memory_for_one_sequence_is_refused(
    checkpoint: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert_refused(ClusterUnderTest(checkpoint, "--kv-cache-bytes", "65536"))
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith("error: ")


def test_a_port_in_use_is_refused(checkpoint: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert_refused(ClusterUnderTest(checkpoint, "--grpc-port", str(taken.getsockname()[1])))
    assert "error: --grpc-port" in capfd.readouterr().err


def test_a_missing_model_is_refused(tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert_refused(ClusterUnderTest(tmp_path / "nothing"))
    assert capfd.readouterr().err == f"error: --model {tmp_path}/nothing: no such directory\n"


def test_a_ray_that_does_not_answer_is_refused(checkpoint: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert_refused(ClusterUnderTest(checkpoint, "--ray-address", "127.0.0.1:1", runtime="ray"))
    assert "error: --ray-address 127.0.0.1:1: Ray is not reachable" in capfd.readouterr().err


def assert_refused(cluster: ClusterUnderTest) -> None:
    """It must end by itself with exit code 2, and leave nothing."""
    cluster.start()
    try:
        with pytest.raises(ClusterError, match="exit status 2"):
            cluster.wait_ready()
        cluster.assert_nothing_left()
    finally:
        cluster.close()
