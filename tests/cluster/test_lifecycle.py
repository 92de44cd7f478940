"""How a real cluster comes and goes, in both runtimes: real command, router and workers on a tiny checkpoint.

How one of Ray serves and drains is in test_ray.py, whose cluster it is.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import signal
import socket
from typing import Literal

import psutil
import pytest

from baton.client import Client
from baton.config import CacheConfig, ModelConfig, WorkerConfig
from deploy.errors import ClusterError
from prefill_worker.actor import PrefillActor
from tests.cluster.harness import ClusterUnderTest, assert_sigterm_lets_a_stream_end, running_cluster
from tests.engine.checkpoints import make_checkpoint

pytestmark = pytest.mark.clusters

Runtime = Literal["process", "ray"]
RUNTIMES: tuple[Runtime, ...] = ("process", "ray")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("llama")
    make_checkpoint("llama", folder)
    return folder


def test_a_cluster_serves_and_sigterm_lets_requests_end_and_leaves_nothing(checkpoint: pathlib.Path) -> None:
    with running_cluster(checkpoint) as cluster, Client(cluster.target) as client:
        pids = {worker["name"]: worker["pid"] for worker in cluster.description["workers"]}
        assert pids == {worker.name: worker.pid for worker in client.status().workers}
        assert set(pids) == {"prefill-0", "decode-0"}
        # It has imported all that workers need: with one more thread it could not fork them.
        assert fork_server(cluster, set(pids.values())).num_threads() == 1
        assert_sigterm_lets_a_stream_end(cluster, client)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_killing_the_command_leaves_nothing(checkpoint: pathlib.Path, runtime: Runtime) -> None:
    cluster = ClusterUnderTest(checkpoint, runtime=runtime)
    cluster.start()
    try:
        cluster.wait_ready()
        with Client(cluster.target) as client:
            # A transfer opens what transports keep, shared memory above all.
            assert client.generate(list(range(3, 67)), max_tokens=2).timings.prefill_worker == "prefill-0"
        workers = [psutil.Process(worker["pid"]) for worker in cluster.description["workers"]]
        cluster.process.kill()
        _, alive = psutil.wait_procs(workers, timeout=5)
        assert alive == []
    finally:
        cluster.kill()


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
            assert cluster.process.wait() == 130
        finally:
            cluster.kill()


def test_a_model_that_is_not_decoder_only_is_refused(
    checkpoint: pathlib.Path, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "bert"
    shutil.copytree(checkpoint, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "bert", "architectures": ["BertModel"]}))
    assert_refused(ClusterUnderTest(model))
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert re.match(r"error: (prefill|decode)-0: .*bert", error.splitlines()[-1], re.IGNORECASE)


def test_too_little_memory_for_one_sequence_is_refused(checkpoint: pathlib.Path) -> None:
    model, cache = ModelConfig(path=str(checkpoint)), CacheConfig(kv_cache_bytes=1000)
    config = WorkerConfig(role="prefill", name="prefill-0", epoch=1, model=model, cache=cache)
    with pytest.raises(ValueError, match=r"^kv_cache_bytes: 1000 is less"):
        PrefillActor(config.model_dump_json()).start()


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


def fork_server(cluster: ClusterUnderTest, workers: set[int]) -> psutil.Process:
    """What the workers were forked from, and look like."""
    (server,) = (p for p in cluster.processes() if "deploy.fork_server" in p.cmdline() and p.pid not in workers)
    return server


def assert_refused(cluster: ClusterUnderTest) -> None:
    """It must end by itself with exit code 2, and leave nothing."""
    cluster.start()
    try:
        with pytest.raises(ClusterError, match="exit status 2"):
            cluster.wait_ready()
    finally:
        cluster.kill()
