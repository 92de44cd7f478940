"""Real Ray clusters: the same workers as actors, replaced when they die, and nothing left of Ray afterwards."""

from __future__ import annotations

import asyncio
import os
import pathlib
import signal
from typing import Any

import pytest

from baton.client import AsyncClient, Client
from tests.cluster.harness import running_cluster
from tests.cluster.inprocess import assert_idle
from tests.cluster.oracle import Oracle, prompt_of
from tests.cluster.test_deaths import wait_until_ready
from tests.engine.checkpoints import make_checkpoint

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return make_checkpoint("gemma3", tmp_path_factory.mktemp("models") / "tiny-gemma3")


async def stream_all(target: str, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    async with AsyncClient(target) as client:
        answers = await asyncio.gather(
            *(client.generate(prompt, max_tokens=max_tokens, temperature=0.0) for prompt in prompts)
        )
    return [list(answer.choices[0].token_ids) for answer in answers]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_ray_cluster_serves_and_replaces_a_worker_that_was_killed(model: pathlib.Path, num_workers: int) -> None:
    oracle = Oracle(model)
    prompts = [prompt_of(length, seed) for seed, length in enumerate([1, 16, 40, 100, 300, 700])]
    expected = [oracle.generate(prompt, 16) for prompt in prompts]
    with (
        running_cluster(model, runtime="ray", prefill_workers=num_workers, decode_workers=num_workers) as cluster,
        Client(cluster.target) as client,
    ):
        assert asyncio.run(stream_all(cluster.target, prompts, 16)) == expected
        assert_idle(client)
        victim = next(worker for worker in client.status().workers if worker.name == "prefill-0")
        os.kill(victim.pid, signal.SIGKILL)
        assert asyncio.run(stream_all(cluster.target, prompts, 16)) == expected
        if num_workers == 1:
            wait_until_ready(client, "prefill-0", victim.epoch)
            replaced = client.generate(prompt_of(200, seed=50), max_tokens=2, **GREEDY)
            assert replaced.timings.prefill_worker == "prefill-0"
        assert_idle(client)
