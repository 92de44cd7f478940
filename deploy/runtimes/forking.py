"""The side of `baton serve` to `deploy.fork_server`: asks it for workers and waits for their end. On the event loop."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import ctypes
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence

from deploy import child
from deploy.errors import StartError

PR_SET_CHILD_SUBREAPER = 36
# Read when numpy is imported, which would start a thread; no worker computes with OpenBLAS.
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}

_log = logging.getLogger(__name__)


class ForkedProcess:
    """A child of this process that another has forked for it, as the first of a session.

    What it has forked itself, the other ranks of a worker, ends with it, and becomes this process's to collect.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._descriptor = os.pidfd_open(pid)
        self._ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._descriptor, self._reap)

    async def wait(self) -> int:
        await self._ended.wait()
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._descriptor)
        _, status = os.waitpid(self.pid, 0)
        os.close(self._descriptor)
        self.returncode = os.waitstatus_to_exitcode(status)
        self._collected = asyncio.get_running_loop().create_task(self._collect_group())

    async def _collect_group(self) -> None:
        """Only then is all that they held free, such as the memory of GPUs."""
        await asyncio.to_thread(_wait_for_group, self.pid)
        self._ended.set()


class ForkServer:
    """Runs the fork server; begins another when one is wanted and it has died, of which its workers notice nothing.

    Args:
        modules: what workers import.
        environment: that of the workers.
    """

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str]) -> None:
        self._modules = modules
        self._environment = {**environment, **ONE_THREAD}
        self._starting = asyncio.Lock()
        self._server: asyncio.subprocess.Process | None = None
        self._server_pids: list[int] = []
        self._control: socket.socket | None = None
        self._waiters: collections.deque[asyncio.Future[ForkedProcess]] = collections.deque()
        self._processes: list[ForkedProcess] = []

    async def start(self) -> None:
        """Begins the process, unless it runs; what it imports is not waited for."""
        async with self._starting:
            if self._control is not None:
                return
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs, contextlib.ExitStack() as undo:
                undo.enter_context(ours)
                self._server = await child.spawn_module(
                    "deploy.fork_server",
                    *(str(theirs.fileno()), str(os.getpid()), *self._modules),
                    pass_fds=[theirs.fileno()],
                    environment=self._environment,
                )
                undo.pop_all()
            self._server_pids.append(self._server.pid)
            ours.setblocking(False)
            self._control = ours
            asyncio.get_running_loop().add_reader(ours, self._receive)

    async def launch(self, own: socket.socket, environment: Mapping[str, str]) -> ForkedProcess:
        """A worker process that has `own`; where this is cancelled it ends as soon as it finds the other end closed.

        Args:
            environment: what the worker's has in place of, or beyond, the common one.

        Raises:
            StartError: the fork server died.
        """
        await self.start()
        assert self._control is not None
        assert self._server is not None
        adopt_orphans(True)
        try:
            socket.send_fds(self._control, [json.dumps(dict(environment)).encode()], [own.fileno()])
            self._waiters.append(asyncio.get_running_loop().create_future())
            return await self._waiters[-1]
        except ConnectionError:
            how = child.describe_exit(await self._server.wait())
            raise StartError(f"what workers are forked from died ({how})") from None

    def _receive(self) -> None:
        """Takes the pid of a worker, in the order of the requests, or the end of the server."""
        assert self._control is not None
        packet = b""
        # A server that was killed before it had read all requests resets the connection.
        with contextlib.suppress(ConnectionResetError):
            packet = self._control.recv(32)
        if packet:
            self._forked(int(packet))
        else:
            _log.warning("what workers are forked from died; the next start takes longer")
            self._hang_up()

    def _forked(self, pid: int) -> None:
        process = ForkedProcess(pid)
        self._processes = [*(each for each in self._processes if each.returncode is None), process]
        waiter = self._waiters.popleft()
        if not waiter.done():
            waiter.set_result(process)

    def _hang_up(self) -> None:
        if self._control is not None:
            asyncio.get_running_loop().remove_reader(self._control)
            self._control.close()
            self._control = None
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_exception(ConnectionResetError())

    async def close(self) -> None:
        """Ends the server and every process that it has forked. Idempotent."""
        # What is being forked right now will end by itself, and is this process's to collect only if it is so already.
        adopt_orphans(False)
        if self._control is not None:
            asyncio.get_running_loop().remove_reader(self._control)
        if self._server is not None:
            await child.kill(self._server)
        if self._control is not None:
            with contextlib.suppress(BlockingIOError, ConnectionResetError):
                while packet := self._control.recv(32):
                    self._forked(int(packet))
        self._hang_up()
        await asyncio.gather(*(child.kill(process) for process in self._processes))
        # Those whose pids nobody told end by themselves, in their servers' groups.
        for pid in self._server_pids:
            await asyncio.to_thread(_wait_for_group, pid)
        self._server_pids.clear()


def _wait_for_group(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-pid, 0)


def can_fork() -> bool:
    """Whether this system has what it takes to be the parent of processes that another forks."""
    if sys.platform != "linux":
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return adopt_orphans(False)


def adopt_orphans(wanted: bool) -> bool:
    """Makes this process the parent of its descendants' orphans, or no longer; False where the system cannot do so."""
    done: int = ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0)
    return done == 0
