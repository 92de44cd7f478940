"""What every worker runtime and host promises; parametrised over the table of hosts."""

from __future__ import annotations

import asyncio
import importlib
import os
import pathlib
import signal
from collections.abc import AsyncIterator, Callable, Mapping

import psutil
import pytest
import pytest_asyncio

from baton.config import ModelConfig, Role, ServeConfig, WorkerConfig, worker_config
from deploy.errors import StartError
from deploy.membership import follow_membership
from deploy.runtimes import HOSTS, make_host
from deploy.runtimes.base import Host, WorkerRuntime
from deploy.runtimes.process import ProcessRuntime
from deploy.runtimes.ray import RayRuntime
from tests.deploy.fake_actors import ACTORS

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.clusters]

REPOSITORY = pathlib.Path(__file__).parents[2]
RUNTIMES: Mapping[str, Callable[[], WorkerRuntime]] = {
    "process": lambda: ProcessRuntime(ACTORS),
    "ray": lambda: RayRuntime(ServeConfig(model=ModelConfig(path="")), ACTORS),
}


def serve_config(runtime: str, folder: pathlib.Path, behaviour: str = "") -> ServeConfig:
    return ServeConfig.model_validate(
        {"model": {"path": str(folder), "served_name": behaviour}, "cluster": {"runtime": runtime}}
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=sorted(HOSTS))
async def runtime_name(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """The name of a runtime whose host is open, with workers that can import the fake actors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        host = make_host(serve_config(request.param, tmp_path_factory.mktemp("model")), ACTORS)
        before = set(psutil.Process().children(recursive=True))
        await host.open()
        yield request.param
        await host.close()
        assert set(psutil.Process().children(recursive=True)) <= before


@pytest_asyncio.fixture(loop_scope="module")
async def runtime(runtime_name: str) -> AsyncIterator[WorkerRuntime]:
    runtime = RUNTIMES[runtime_name]()
    yield runtime
    if isinstance(runtime, ProcessRuntime):
        await runtime.close()


@pytest.fixture
def worker(runtime_name: str, tmp_path: pathlib.Path) -> Callable[..., WorkerConfig]:
    def configure(behaviour: str = "", role: Role = "prefill", epoch: int = 1) -> WorkerConfig:
        return worker_config(serve_config(runtime_name, tmp_path, behaviour), role, f"{role}-0", epoch)

    return configure


async def test_every_host_has_a_runtime_under_test() -> None:
    assert set(RUNTIMES) == set(HOSTS)


async def test_a_worker_starts_in_a_process_of_its_own_and_tells_who_it_is(
    runtime: WorkerRuntime, worker: Callable[..., WorkerConfig]
) -> None:
    handle = await runtime.start(worker(role="decode", epoch=7))
    assert (handle.info.role, handle.info.name, handle.info.epoch) == ("decode", "decode-0", 7)
    assert handle.info.pid != os.getpid()
    assert psutil.pid_exists(handle.info.pid)
    await handle.kill()


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("refuses", "prefill-0: architecture 'bert' is not decoder-only"),
        ("has a bug", "prefill-0: KeyError: 'layers'"),
        ("dies", "prefill-0 died while starting"),
    ],
)
async def test_a_worker_that_cannot_start_says_why(
    runtime: WorkerRuntime, worker: Callable[..., WorkerConfig], behaviour: str, message: str
) -> None:
    with pytest.raises(StartError, match=message):
        await runtime.start(worker(behaviour))


async def test_a_killed_worker_is_noticed_at_once(runtime: WorkerRuntime, worker: Callable[..., WorkerConfig]) -> None:
    handle = await runtime.start(worker())
    death = asyncio.create_task(handle.wait_dead())
    os.kill(handle.info.pid, signal.SIGKILL)
    assert await asyncio.wait_for(death, 2)
    await handle.stop(1)
    await handle.kill()


async def test_stopping_drains_first(
    runtime: WorkerRuntime, worker: Callable[..., WorkerConfig], tmp_path: pathlib.Path
) -> None:
    handle = await runtime.start(worker())
    await handle.stop(12.5)
    assert (tmp_path / "prefill-0.drained").read_text() == "12.5"
    assert (tmp_path / "prefill-0.stopped").exists()
    await handle.wait_dead()


async def test_a_worker_that_does_not_stop_in_time_is_killed(
    runtime_name: str,
    runtime: WorkerRuntime,
    worker: Callable[..., WorkerConfig],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.import_module(f"deploy.runtimes.{runtime_name}"), "STOP_GRACE_S", 0.3)
    handle = await runtime.start(worker("never drains"))
    await handle.stop(0.2)
    await handle.wait_dead()
    assert not (tmp_path / "prefill-0.stopped").exists()


async def test_a_cancelled_start_ends_the_process(
    runtime: WorkerRuntime, worker: Callable[..., WorkerConfig], tmp_path: pathlib.Path
) -> None:
    started = tmp_path / "prefill-0.started"
    os.mkfifo(started)
    start = asyncio.create_task(runtime.start(worker("hangs")))
    process = psutil.Process(int(await asyncio.to_thread(started.read_text)))
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    await asyncio.to_thread(process.wait, 5)


async def test_a_host_supervises_workers_and_replaces_a_dead_one(runtime_name: str, tmp_path: pathlib.Path) -> None:
    host: Host = make_host(serve_config(runtime_name, tmp_path), ACTORS)
    supervisor = host.supervisor()
    views = follow_membership(await supervisor.start())
    killed = None
    async for view in views:
        if killed is None and len(view.workers) == 2:
            killed = view.workers[0]
            os.kill(killed.pid, signal.SIGKILL)
        elif killed is not None and len(view.workers) == 2:
            break
    replaced = view.workers[0]
    assert killed is not None
    assert (replaced.name, replaced.epoch) == (killed.name, 3)
    await views.aclose()
    await supervisor.stop(1.0)
    await supervisor.wait_stopped()
    assert (tmp_path / "decode-0.stopped").exists()
    await host.close()


async def test_a_host_passes_on_why_the_first_workers_failed(runtime_name: str, tmp_path: pathlib.Path) -> None:
    host = make_host(serve_config(runtime_name, tmp_path, "refuses"), ACTORS)
    supervisor = host.supervisor()
    await supervisor.start()
    with pytest.raises(StartError, match=r"^(prefill|decode)-0: architecture 'bert' is not decoder-only$"):
        await supervisor.wait_stopped()
    await supervisor.stop(0)
    await host.close()
