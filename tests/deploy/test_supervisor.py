"""What the supervisor does about workers, on a runtime of futures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from baton.config import ClusterConfig, ModelConfig, ServeConfig, WorkerConfig
from baton.internal.v1 import worker_pb2
from deploy.backoff import BackoffPolicy
from deploy.errors import StartError
from deploy.membership import follow_membership
from deploy.supervisor import Supervisor


class FakeWorker:
    """Dies when `death` is given a result."""

    def __init__(self, config: WorkerConfig) -> None:
        self.info = worker_pb2.WorkerInfo(role=config.role, name=config.name, epoch=config.epoch)
        self.death: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.drained_s: float | None = None

    async def wait_dead(self) -> str:
        return await asyncio.shield(self.death)

    async def stop(self, drain_s: float) -> None:
        self.drained_s = drain_s
        self.death.set_result("stopped")

    async def kill(self) -> None:
        self.death.set_result("killed")


class FakeRuntime:
    """Starts what `failures` does not forbid; `starts` gets every config that it is asked for."""

    def __init__(self) -> None:
        self.workers: dict[str, FakeWorker] = {}
        self.starts: asyncio.Queue[WorkerConfig] = asyncio.Queue()
        self.failures: list[str] = []

    async def start(self, config: WorkerConfig) -> FakeWorker:
        self.starts.put_nowait(config)
        if self.failures:
            raise StartError(f"{config.name}: {self.failures.pop()}")
        self.workers[config.name] = FakeWorker(config)
        return self.workers[config.name]


class Views:
    """The membership as a follower sees it."""

    def __init__(self, address: str) -> None:
        self._views = follow_membership(address)

    async def until(self, *expected: tuple[str, int]) -> None:
        async for view in self._views:
            if {(worker.name, worker.epoch) for worker in view.workers} == set(expected):
                return

    async def close(self) -> None:
        await self._views.aclose()


CONFIG = ServeConfig(model=ModelConfig(path="m"), cluster=ClusterConfig(prefill_workers=1, decode_workers=2))


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime()


@pytest_asyncio.fixture
async def supervisor(runtime: FakeRuntime) -> AsyncIterator[Supervisor]:
    supervisor = Supervisor(CONFIG, runtime, BackoffPolicy(first_s=0.01, most_s=0.04, steady_s=60))
    yield supervisor
    await supervisor.let_go()


@pytest_asyncio.fixture
async def views(supervisor: Supervisor) -> AsyncIterator[Views]:
    views = Views(await supervisor.start())
    yield views
    await views.close()


async def test_the_wanted_workers_start_each_with_a_name_and_an_epoch(views: Views, runtime: FakeRuntime) -> None:
    await views.until(("prefill-0", 1), ("decode-0", 2), ("decode-1", 3))
    assert runtime.workers["decode-1"].info.role == "decode"


async def test_a_dead_worker_leaves_and_another_with_a_new_epoch_joins(views: Views, runtime: FakeRuntime) -> None:
    await views.until(("prefill-0", 1), ("decode-0", 2), ("decode-1", 3))
    runtime.workers["decode-0"].death.set_result("killed by SIGKILL")
    await views.until(("prefill-0", 1), ("decode-1", 3))
    await views.until(("prefill-0", 1), ("decode-0", 4), ("decode-1", 3))


async def test_a_replacement_that_does_not_start_is_tried_again(views: Views, runtime: FakeRuntime) -> None:
    await views.until(("prefill-0", 1), ("decode-0", 2), ("decode-1", 3))
    runtime.failures = ["no memory", "no memory"]
    runtime.workers["prefill-0"].death.set_result("killed by SIGKILL")
    await views.until(("prefill-0", 6), ("decode-0", 2), ("decode-1", 3))


async def test_the_first_start_must_succeed(supervisor: Supervisor, runtime: FakeRuntime) -> None:
    runtime.failures = ["not decoder-only"]
    await supervisor.start()
    with pytest.raises(StartError, match="prefill-0: not decoder-only"):
        await supervisor.wait_stopped()


async def test_stopping_drains_every_worker_and_replaces_none(
    views: Views, supervisor: Supervisor, runtime: FakeRuntime
) -> None:
    await views.until(("prefill-0", 1), ("decode-0", 2), ("decode-1", 3))
    stopped = asyncio.create_task(supervisor.wait_stopped())
    await supervisor.stop(7.5)
    await stopped
    assert {worker.drained_s for worker in runtime.workers.values()} == {7.5}
    assert runtime.starts.qsize() == 3


async def test_letting_go_leaves_workers_alone(views: Views, supervisor: Supervisor, runtime: FakeRuntime) -> None:
    await views.until(("prefill-0", 1), ("decode-0", 2), ("decode-1", 3))
    await supervisor.let_go()
    assert not any(worker.death.done() for worker in runtime.workers.values())
    runtime.workers["decode-0"].death.set_result("killed")
    assert runtime.starts.qsize() == 3
