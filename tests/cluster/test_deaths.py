"""Workers are killed with -9 at every stage: no request hangs, none is lost before its KV is committed, all is given
back."""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import signal
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.client import Client, Delta
from baton.errors import BatonError, UnavailableError
from tests.cluster.harness import ClusterUnderTest, running_cluster
from tests.cluster.inprocess import assert_idle
from tests.cluster.oracle import Oracle, prompt_of
from tests.engine.checkpoints import make_checkpoint

pytestmark = pytest.mark.clusters

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def cluster(model: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterUnderTest]:
    # Small chunks make a prompt of 2,000 tokens take long enough to be caught at it.
    config = tmp_path_factory.mktemp("config") / "baton.yaml"
    config.write_text("prefill: {max_batch_tokens: 16}\ntransfer: {lease_s: 3}\n")
    with running_cluster(model, "--config", str(config)) as cluster:
        yield cluster


@pytest.fixture
def client(cluster: ClusterUnderTest) -> Iterator[Client]:
    with Client(cluster.target) as client:
        yield client
    # A channel of its own: the router that the first one knew may be gone.
    with Client(cluster.target) as client:
        wait_until_ready(client)
        assert_idle(client)


def kill(client: Client, name: str) -> int:
    """Kills the incarnation of a worker that the router knows; returns its epoch."""
    worker = next(worker for worker in client.status().workers if worker.name == name)
    os.kill(worker.pid, signal.SIGKILL)
    return worker.epoch


def wait_until_ready(client: Client, name: str = "", after_epoch: int = 0) -> None:
    """Until both roles are connected, and the worker `name` is a later incarnation than `after_epoch`."""
    with grpc.insecure_channel(client.target) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(), timeout=60, wait_for_ready=True
        )
        for answer in watch:
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                workers = {worker.name: worker.epoch for worker in client.status().workers}
                if not name or workers.get(name, 0) > after_epoch:
                    return


def test_a_prefill_worker_dies_in_the_middle_of_a_prompt(client: Client, model: pathlib.Path) -> None:
    prompt = prompt_of(2000, seed=1)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answer = pool.submit(client.generate, prompt, max_tokens=10, timeout_s=60, **GREEDY)
        while not any(worker.running and worker.role == "prefill" for worker in client.status().workers):
            assert not answer.done()
        epoch = kill(client, "prefill-0")
        completion = answer.result()
    assert list(completion.choices[0].token_ids) == Oracle(model).generate(prompt, 10)
    assert completion.timings.attempts > 1 or completion.timings.local_prefill
    wait_until_ready(client, "prefill-0", epoch)
    completion = client.generate(prompt_of(100, seed=3), max_tokens=2, **GREEDY)
    assert completion.timings.prefill_worker == "prefill-0"


def test_streams_of_a_dead_decode_worker_end_with_unavailable_and_the_next_request_is_served(client: Client) -> None:
    streams = [client.stream(prompt_of(50, seed), max_tokens=1500, timeout_s=60, **GREEDY) for seed in range(4)]
    for stream in streams:
        # The first token is the prefill worker's; with the third, decode is well under way.
        for _ in range(3):
            next(stream)
    epoch = kill(client, "decode-0")
    for stream in streams:
        with pytest.raises(UnavailableError):
            list(stream)
    # A request that comes while nobody can decode waits for the replacement.
    assert client.generate(prompt_of(64), max_tokens=2, timeout_s=60, **GREEDY).usage.completion_tokens == 2
    assert next(worker for worker in client.status().workers if worker.name == "decode-0").epoch > epoch


def test_a_decode_worker_that_dies_before_the_commit_costs_a_retry_and_forces_what_was_delivered(
    client: Client, model: pathlib.Path
) -> None:
    prompt = prompt_of(2000, seed=2)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answer = pool.submit(client.generate, prompt, max_tokens=10, timeout_s=60, **GREEDY)
        while not any(worker.running and worker.role == "prefill" for worker in client.status().workers):
            assert not answer.done()
        kill(client, "decode-0")
        completion = answer.result()
    assert list(completion.choices[0].token_ids) == Oracle(model).generate(prompt, 10)


def test_requests_under_load_survive_the_prefill_worker(client: Client, model: pathlib.Path) -> None:
    prompts = [prompt_of(400, seed) for seed in range(30, 38)]

    def run(prompt: list[int]) -> list[Delta] | BatonError:
        try:
            return list(client.stream(prompt, max_tokens=8, timeout_s=90, **GREEDY))
        except BatonError as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(run, prompt) for prompt in prompts]
        while not any(worker.running and worker.role == "prefill" for worker in client.status().workers):
            assert not all(answer.done() for answer in answers)
        kill(client, "prefill-0")
        results = [answer.result() for answer in answers]
    oracle = Oracle(model)
    for prompt, deltas in zip(prompts, results, strict=True):
        assert not isinstance(deltas, BatonError)
        assert [t for d in deltas for c in d.choices for t in c.token_ids] == oracle.generate(prompt, 8)


def test_the_router_comes_back_on_its_ports(cluster: ClusterUnderTest, client: Client) -> None:
    routers = [p for p in cluster.processes() if "router" in p.cmdline()]
    assert len(routers) == 1
    stream = client.stream(prompt_of(50), max_tokens=1500, **GREEDY)
    next(stream)
    routers[0].kill()
    with pytest.raises(UnavailableError):
        list(stream)
    with Client(cluster.target) as again:
        wait_until_ready(again)
        completion = again.generate(prompt_of(20), max_tokens=2, timeout_s=60, **GREEDY)
    assert completion.usage.completion_tokens == 2
