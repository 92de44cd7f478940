"""How the followers' processes are made: forked where this process has one thread alone, as one has that is about to
become a worker, else begun anew, which takes seconds of importing.

Either way they are tied to the thread that makes them, and inherit nothing but their two sockets and the standard
streams.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NoReturn, Protocol

from baton import tether

# A follower's sockets, in this order: steps, transfers.
Sockets = tuple[socket.socket, socket.socket]

# What a process that is to end gets for it, before it is killed.
GRACE_S = 5.0


class Process(Protocol):
    """A child process; any thread may call."""

    def wait(self, timeout: float | None = None) -> int:
        """Its return code; raises subprocess.TimeoutExpired."""
        ...

    def kill(self) -> None: ...


class Launched:
    """Followers' processes, and this process's ends of their sockets.

    Attributes:
        processes, sockets: one for each follower.
    """

    def __init__(self, count: int) -> None:
        """To be made by a thread that lasts as long as they, if there is no other."""
        self.processes: list[Process] = []
        self.sockets: list[Sockets] = []
        self._closed = threading.Event()
        if count and _can_fork():
            for _ in range(count):
                self._launch(_Forked)
        elif count:
            spawned: Future[None] = Future()
            self._spawner = threading.Thread(target=self._spawn, args=(count, spawned), name="ranks", daemon=True)
            self._spawner.start()
            spawned.result()

    def close(self) -> None:
        """Hangs up, and waits for the processes to end. Idempotent."""
        for channels in self.sockets:
            for end in channels:
                # Waking whoever receives; others may have hung up before.
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        for process in self.processes:
            describe_end(process)
        self._closed.set()

    def _spawn(self, count: int, spawned: Future[None]) -> None:
        try:
            for _ in range(count):
                self._launch(_spawned)
        except BaseException as error:
            spawned.set_exception(error)
            return
        spawned.set_result(None)
        # A process ends with the thread that it is tied to.
        self._closed.wait()

    def _launch(self, make: Callable[[Sockets], Process]) -> None:
        ours, theirs = zip(socket.socketpair(), socket.socketpair(), strict=True)
        try:
            self.processes.append(make(theirs))
            self.sockets.append(ours)
        finally:
            for end in theirs:
                end.close()


class _Forked:
    """A child that goes on from here as a follower."""

    def __init__(self, sockets: Sockets) -> None:
        leader = os.getpid()
        self._pid = os.fork()
        if not self._pid:
            _become_follower(leader, sockets)
        self._descriptor = os.pidfd_open(self._pid)
        self._lock = threading.Lock()
        self._returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if not select.select([self._descriptor], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("follower", timeout or 0.0)
        with self._lock:
            if self._returncode is None:
                _, status = os.waitpid(self._pid, 0)
                self._returncode = os.waitstatus_to_exitcode(status)
            return self._returncode

    def kill(self) -> None:
        with self._lock:
            if self._returncode is None:
                signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)

    def __del__(self) -> None:
        os.close(self._descriptor)


def _spawned(sockets: Sockets) -> Process:
    descriptors = [end.fileno() for end in sockets]
    # -P: a folder named like one of our packages in the working directory must not be taken for it.
    command = [sys.executable, "-P", "-m", "worker.ranks.follower", *map(str, descriptors)]
    return subprocess.Popen(
        [sys.executable, "-I", "-S", tether.__file__, str(os.getpid()), *command],
        stdin=subprocess.DEVNULL,
        pass_fds=descriptors,
    )


def _become_follower(leader: int, sockets: Sockets) -> NoReturn:
    """In the forked child; nothing above it on the stack is returned to, or taken apart."""
    exit_code = 1
    try:
        if tether.tie(leader):
            _close_all_but(sockets)
            # With all that it imports, which the leader has imported as well.
            from worker.ranks import follower

            exit_code = follower.run(sockets)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(exit_code)


def _close_all_but(sockets: Sequence[socket.socket]) -> None:
    kept = {0, 1, 2, *(end.fileno() for end in sockets)}
    for name in os.listdir("/proc/self/fd"):
        if (descriptor := int(name)) not in kept:
            # That of the listing itself is closed already.
            with contextlib.suppress(OSError):
                os.close(descriptor)


def describe_end(process: Process) -> str:
    """How a process that has ended, or is ending, did so."""
    try:
        returncode = process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        returncode = process.wait()
    return f"killed by {signal.Signals(-returncode).name}" if returncode < 0 else f"exit status {returncode}"


def _can_fork() -> bool:
    """Whether this process is one thread, on a system that ties processes and names them by descriptors."""
    return sys.platform == "linux" and hasattr(os, "pidfd_open") and len(os.listdir("/proc/self/task")) == 1
