"""Workers of two ranks each: streams equal those of `transformers`, and a rank that is killed takes its worker along,
which is replaced."""

from __future__ import annotations

import concurrent.futures
import pathlib
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from baton.client import Client
from tests.cluster.harness import ClusterUnderTest, running_cluster
from tests.cluster.inprocess import assert_idle
from tests.cluster.oracle import Oracle, prompt_of
from tests.cluster.test_deaths import wait_until_ready
from tests.engine.checkpoints import make_checkpoint

pytestmark = pytest.mark.clusters

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "timeout_s": 60}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return make_checkpoint("gemma3", tmp_path_factory.mktemp("models") / "tiny-gemma")


@pytest.fixture(scope="module")
def cluster(model: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterUnderTest]:
    config = tmp_path_factory.mktemp("config") / "baton.yaml"
    # Small chunks make a prompt of 1,000 tokens take long enough to be caught at it.
    config.write_text("prefill: {max_batch_tokens: 16}\ntransfer: {lease_s: 3}\n")
    degrees = ["--prefill-tensor-parallel-size", "2", "--decode-tensor-parallel-size", "2"]
    with running_cluster(model, "--config", str(config), *degrees) as cluster:
        yield cluster


@pytest.fixture
def client(cluster: ClusterUnderTest) -> Iterator[Client]:
    with Client(cluster.target) as client:
        yield client
        wait_until_ready(client)
        assert_idle(client)


def rank_of(client: Client, name: str) -> tuple[psutil.Process, int]:
    """The process of a worker's second rank, and the worker's epoch."""
    worker = next(worker for worker in client.status().workers if worker.name == name)
    (rank,) = psutil.Process(worker.pid).children()
    return rank, worker.epoch


def test_greedy_tokens_equal_those_of_transformers(client: Client, model: pathlib.Path) -> None:
    """Prompts that end within a block and at one's end; the choices' forks copy what lies in the partial one."""
    oracle = Oracle(model)
    for length in (77, 96, 40):
        completion = client.generate(prompt_of(length), max_tokens=12, n=2, **GREEDY)
        expected = oracle.generate(prompt_of(length), 12)
        assert [list(choice.token_ids) for choice in completion.choices] == [expected] * 2
        assert not completion.timings.local_prefill


def test_a_rank_that_is_killed_costs_a_retry(client: Client, model: pathlib.Path) -> None:
    prompt = prompt_of(1000)
    rank, epoch = rank_of(client, "decode-0")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answer = pool.submit(client.generate, prompt, max_tokens=6, **GREEDY)
        while not any(worker.running and worker.role == "prefill" for worker in client.status().workers):
            assert not answer.done()
        rank.kill()
        completion = answer.result()
    assert list(completion.choices[0].token_ids) == Oracle(model).generate(prompt, 6)
    wait_until_ready(client, "decode-0", epoch)


def test_ranks_end_with_their_leader(client: Client) -> None:
    rank, epoch = rank_of(client, "prefill-0")
    leader = rank.parent()
    assert leader is not None
    leader.kill()
    rank.wait(10)
    wait_until_ready(client, "prefill-0", epoch)
    assert client.generate(prompt_of(40), max_tokens=2, **GREEDY).usage.completion_tokens == 2
