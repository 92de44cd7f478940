"""How worker processes are made: what both launchers promise, and what a fork server does beyond that."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pathlib
import signal
import socket
from collections.abc import AsyncIterator, Callable, Mapping

import psutil
import pytest
import pytest_asyncio

from baton.config import WorkerConfig
from deploy import child
from deploy.errors import StartError
from deploy.hosting import read_report
from deploy.runtimes.forking import ForkServer, can_fork
from deploy.runtimes.launchers import Launcher, Spawner, make_launcher
from tests.deploy.fake_actors import ACTORS

REPOSITORY = pathlib.Path(__file__).parents[2]
FAKE = "tests.deploy.fake_actors"

needs_forks = pytest.mark.skipif(not can_fork(), reason="this system cannot adopt what another process forks")

Fork = Callable[..., ForkServer]


@pytest.fixture
def environment(tmp_path: pathlib.Path) -> Mapping[str, str]:
    """That of workers: they find the fake actors, and modules that a test writes to `tmp_path`."""
    return {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{tmp_path}"}


@pytest.fixture
def others() -> set[psutil.Process]:
    """This process's children that are none of the test's."""
    return set(psutil.Process().children())


@pytest_asyncio.fixture(params=["fork", "spawn"])
async def launcher(
    request: pytest.FixtureRequest, environment: Mapping[str, str], others: set[psutil.Process]
) -> AsyncIterator[Launcher]:
    if request.param == "fork" and not can_fork():
        pytest.skip("this system cannot adopt what another process forks")
    launcher: Launcher = ForkServer([FAKE], environment) if request.param == "fork" else Spawner(environment)
    await launcher.start()
    yield launcher
    await launcher.close()
    assert set(psutil.Process().children()) <= others


@pytest_asyncio.fixture
async def fork(environment: Mapping[str, str], others: set[psutil.Process]) -> AsyncIterator[Fork]:
    """Makes fork servers; each must leave no process."""
    servers: list[ForkServer] = []

    def make(*modules: str) -> ForkServer:
        servers.append(ForkServer(modules, environment))
        return servers[-1]

    yield make
    for server in servers:
        await server.close()
    assert set(psutil.Process().children()) <= others


class Worker:
    """A launched process and our end of its socket; both end with the context."""

    def __init__(self, process: child.Process, ours: socket.socket) -> None:
        self.process = process
        self.pid = process.pid
        self.socket = ours

    async def begin(self, folder: pathlib.Path, actor: str = ACTORS["prefill"]) -> str:
        """Orders the fake actor to start; returns the name in its report."""
        config = WorkerConfig.model_validate(
            {"role": "prefill", "name": "prefill-0", "epoch": 1, "model": {"path": str(folder)}}
        )
        order = {"actor": actor, "config": config.model_dump(mode="json")}
        self.socket.sendall(json.dumps(order).encode() + b"\n")
        return read_report("prefill-0", await asyncio.to_thread(self.socket.recv, 65536)).name


@contextlib.asynccontextmanager
async def launched(launcher: Launcher, environment: Mapping[str, str] | None = None) -> AsyncIterator[Worker]:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = await launcher.launch(theirs, environment or {})
        try:
            yield Worker(process, ours)
        finally:
            await child.kill(process)


def server_process(workers: list[Worker], others: set[psutil.Process]) -> psutil.Process:
    """The fork server: of the test's children the one that is no worker."""
    (server,) = (
        child for child in psutil.Process().children() if child not in others and child.pid not in pids(workers)
    )
    return server


def pids(workers: list[Worker]) -> set[int]:
    return {worker.pid for worker in workers}


async def test_a_worker_is_a_child_in_a_session_of_its_own_with_its_environment(
    launcher: Launcher, tmp_path: pathlib.Path
) -> None:
    async with launched(launcher, {"FLAVOUR": "mint"}) as worker:
        assert await worker.begin(tmp_path) == "prefill-0"
        assert psutil.Process(worker.pid).ppid() == os.getpid()
        assert os.getsid(worker.pid) == worker.pid
        assert (tmp_path / "prefill-0.flavour").read_text() == "mint"
        assert (tmp_path / "prefill-0.started").read_text() == str(worker.pid)


async def test_how_a_worker_ended_is_told(launcher: Launcher) -> None:
    async with launched(launcher) as first, launched(launcher) as second:
        os.kill(first.pid, signal.SIGTERM)
        assert await first.process.wait() == -signal.SIGTERM
        os.kill(second.pid, signal.SIGKILL)
        assert await second.process.wait() == second.process.returncode == -signal.SIGKILL


async def test_a_worker_ends_when_the_other_end_is_closed_before_any_order(launcher: Launcher) -> None:
    async with launched(launcher) as worker:
        worker.socket.close()
        assert await worker.process.wait() == 1


@needs_forks
def test_workers_are_forked_where_that_can_be_done() -> None:
    assert isinstance(make_launcher(ACTORS.values()), ForkServer)


@needs_forks
async def test_workers_outlive_their_fork_server_and_the_next_one_has_another(
    fork: Fork, others: set[psutil.Process], tmp_path: pathlib.Path
) -> None:
    server = fork(FAKE)
    async with launched(server) as first:
        dead = server_process([first], others)
        dead.kill()
        assert await first.begin(tmp_path) == "prefill-0"
        with contextlib.suppress(ChildProcessError):
            # The event loop is to reap it.
            await asyncio.to_thread(os.waitid, os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
        async with launched(server) as second:
            assert await second.begin(tmp_path) == "prefill-0"
            assert server_process([first, second], others).pid != dead.pid
            os.kill(first.pid, signal.SIGKILL)
            assert await first.process.wait() == -signal.SIGKILL


@needs_forks
async def test_what_a_worker_has_forked_ends_with_it_and_is_collected(fork: Fork, tmp_path: pathlib.Path) -> None:
    (tmp_path / "ranked.py").write_text(
        f"""
import os, signal
from baton import tether
from {FAKE} import FakeActor

class Ranked(FakeActor):
    def __init__(self, config_json):
        super().__init__(config_json)
        leader = os.getpid()
        if not os.fork():
            tether.tie(leader)
            signal.pause()
"""
    )
    async with launched(fork("ranked")) as worker:
        await worker.begin(tmp_path, "ranked:Ranked")
        (rank,) = psutil.Process(worker.pid).children()
        os.kill(worker.pid, signal.SIGKILL)
        assert await worker.process.wait() == -signal.SIGKILL
        assert not rank.is_running()


@needs_forks
async def test_a_fork_server_that_dies_while_it_imports_is_told(fork: Fork, tmp_path: pathlib.Path) -> None:
    (tmp_path / "dying.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(StartError, match="killed by SIGKILL"):
        async with launched(fork("dying")):
            pass


@needs_forks
async def test_closing_a_fork_server_while_it_forks_is_quiet(fork: Fork, capfd: pytest.CaptureFixture[str]) -> None:
    """What it was forking finds nobody to answer, and ends."""
    server = fork()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        launches = [asyncio.create_task(server.launch(theirs, {})) for _ in range(16)]
        await launches[0]
        await server.close()
        await asyncio.gather(*launches, return_exceptions=True)
        theirs.close()
        # They have it too, so it ends when they have.
        assert await asyncio.to_thread(ours.recv, 1) == b""
    assert capfd.readouterr().err == ""


@needs_forks
async def test_a_start_that_is_cancelled_while_it_imports_leaves_nothing(fork: Fork, tmp_path: pathlib.Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    (tmp_path / "waiting.py").write_text(f"open({str(gate)!r}).read()")
    server = fork("waiting")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        launch = asyncio.create_task(server.launch(theirs, {}))
        # Opens when the other side has.
        writing = await asyncio.to_thread(gate.open, "w")
        launch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await launch
    writing.close()
    # The answer to the cancelled request is not taken for that to the next.
    async with launched(server) as worker:
        assert await worker.begin(tmp_path) == "prefill-0"


@needs_forks
async def test_a_module_that_cannot_be_imported_is_the_workers_to_tell(fork: Fork, tmp_path: pathlib.Path) -> None:
    async with launched(fork("no.such.module", FAKE)) as worker:
        assert await worker.begin(tmp_path) == "prefill-0"


@needs_forks
async def test_where_importing_starts_a_thread_workers_are_begun_anew(fork: Fork, tmp_path: pathlib.Path) -> None:
    (tmp_path / "threaded.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()"
    )
    async with launched(fork("threaded")) as worker:
        assert await worker.begin(tmp_path) == "prefill-0"
        assert "deploy.worker_process" in psutil.Process(worker.pid).cmdline()
        assert psutil.Process(worker.pid).ppid() == os.getpid()
