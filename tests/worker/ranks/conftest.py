"""Teams of two ranks: the leader in the test's process, the follower in one of its own."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import psutil
import pytest

from baton.config import CacheConfig, DecodeConfig, ModelConfig, WorkerConfig
from engine.engine import Engine
from worker.ranks.processes import Launched
from worker.ranks.team import RankTeam

CHUNK_TOKENS = 32


class ForkedFollower(Launched):
    """One follower, forked by another process than this one.

    Attributes:
        pid: of its process.
    """

    def __init__(self, control: socket.socket) -> None:
        super().__init__(0)
        self._control = control
        self._launch(self._fork)

    def _fork(self, sockets: tuple[socket.socket, socket.socket]) -> ForkedFollower:
        socket.send_fds(self._control, [b"fork"], [end.fileno() for end in sockets])
        self.pid = int(self._control.recv(16))
        return self

    def wait(self, timeout: float | None = None) -> int:
        """Its parent alone learns how it ended."""
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(self.pid).wait(timeout)
        return 0

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


class Team:
    """A team that has loaded its engines.

    Attributes:
        lost: set when the leader would end its process.
    """

    def __init__(self, launched: ForkedFollower, config: WorkerConfig) -> None:
        self.follower = launched
        self.lost = threading.Event()
        self.ranks = RankTeam(config, launched, on_lost=self.lost.set)
        try:
            self.engine: Engine = self.ranks.load(chunk_tokens=CHUNK_TOKENS, decode_sequences=0)
            self.shards = self.ranks.start(lambda _: None)
        except BaseException:
            self.ranks.close()
            raise


MakeTeam = Callable[[pathlib.Path], Team]


@pytest.fixture(scope="module")
def forker() -> Iterator[socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "tests.worker.ranks.forker", str(theirs.fileno())]
    # Read when numpy is imported, which would start a thread.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    with ours, subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment) as process:
        theirs.close()
        yield ours
        process.kill()


@pytest.fixture
def make_team(forker: socket.socket) -> Iterator[MakeTeam]:
    """Makes teams on a checkpoint; each is closed, and its follower gone, at the end."""
    with contextlib.ExitStack() as teams:
        yield lambda path: teams.enter_context(running_team(forker, path))


def team_config(path: pathlib.Path) -> WorkerConfig:
    """That of a decode worker of two ranks."""
    return WorkerConfig(
        role="decode",
        name="decode-0",
        epoch=1,
        model=ModelConfig(path=str(path), num_threads=2),
        cache=CacheConfig(kv_cache_bytes=4 << 20),
        decode=DecodeConfig(tensor_parallel_size=2),
    )


@contextlib.contextmanager
def running_team(forker: socket.socket, path: pathlib.Path) -> Iterator[Team]:
    with contextlib.closing(ForkedFollower(forker)) as launched:
        team = Team(launched, team_config(path))
        with contextlib.closing(team.ranks):
            yield team
