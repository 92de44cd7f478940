"""Real Ray clusters: the same workers as actors, replaced when they die, and nothing left of Ray afterwards."""

from __future__ import annotations

import asyncio
import os
import pathlib
import signal
import subprocess
from typing import Any

import pytest

from baton.client import AsyncClient, Client
from baton.errors import DeadlineError
from tests.cluster.harness import assert_sigterm_lets_a_stream_end, running_cluster
from tests.cluster.inprocess import assert_idle
from tests.cluster.oracle import Oracle, prompt_of
from tests.engine.checkpoints import make_checkpoint

pytestmark = pytest.mark.clusters

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return make_checkpoint("gemma3", tmp_path_factory.mktemp("models") / "tiny-gemma3")


async def use_in_every_way(target: str, oracle: Oracle) -> None:
    """Streams of all kinds at once, some of which end early."""
    prompts = [prompt_of(length, seed) for seed, length in enumerate([1, 16, 40, 100, 300, 700])]
    async with AsyncClient(target) as client:
        whole = [client.generate(prompt, max_tokens=16, temperature=0.0) for prompt in prompts]
        choices = client.generate(prompt_of(90), n=3, temperature=1.0, seed=1, max_tokens=12, ignore_eos=True)
        late = client.generate(prompt_of(500), max_tokens=1400, timeout_s=0.3, **GREEDY)
        cancelled = asyncio.create_task(client.generate(prompt_of(600), max_tokens=1400, **GREEDY))
        asyncio.get_running_loop().call_later(0.2, cancelled.cancel)
        results: list[Any] = await asyncio.gather(*whole, choices, late, cancelled, return_exceptions=True)
        *answers, sampled, deadline, gone = results
        text = answers[-1].choices[0].text
        stopped = await client.generate(prompts[-1], max_tokens=16, temperature=0.0, stop=text[2:5])
    for prompt, answer in zip(prompts, answers, strict=True):
        assert list(answer.choices[0].token_ids) == oracle.generate(prompt, 16)
    assert len({choice.token_ids for choice in sampled.choices}) == 3
    assert isinstance(deadline, DeadlineError)
    assert isinstance(gone, asyncio.CancelledError)
    assert stopped.choices[0].text == text[: text.index(text[2:5])]


@pytest.mark.timeout(240)
def test_a_ray_cluster_serves_replaces_a_worker_that_was_killed_and_lets_requests_end_on_sigterm(
    model: pathlib.Path,
) -> None:
    oracle = Oracle(model)
    with (
        running_cluster(model, runtime="ray", prefill_workers=2, stderr=subprocess.PIPE) as cluster,
        Client(cluster.target) as client,
    ):
        pids = {worker["name"]: worker["pid"] for worker in cluster.description["workers"]}
        assert set(pids) == {"prefill-0", "prefill-1", "decode-0"}
        asyncio.run(use_in_every_way(cluster.target, oracle))
        assert_idle(client)
        # The cluster is ready as soon as the router knows one worker of each role.
        assert pids == {worker.name: worker.pid for worker in client.status().workers}
        victim = next(worker for worker in client.status().workers if worker.name == "prefill-0")
        os.kill(victim.pid, signal.SIGKILL)
        asyncio.run(use_in_every_way(cluster.target, oracle))
        # Its twin keeps the cluster ready, so that nothing but the steps tells of the replacement.
        assert cluster.process.stderr is not None
        for step in ("prefill-0 died; starting another", "prefill-0 is up"):
            assert any(step in line for line in cluster.process.stderr)
        assert client.generate(prompt_of(200, seed=50), max_tokens=2, **GREEDY).timings.prefill_worker
        assert_idle(client)
        assert_sigterm_lets_a_stream_end(cluster, client)
