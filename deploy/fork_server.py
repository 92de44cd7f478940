"""The process that workers are forked from: `python -m deploy.fork_server FD PARENT_PID MODULE...`, on Linux.

It imports the modules once, which takes seconds, so that every worker and every replacement has them at once. FD is a
packet socket to `baton serve`. A packet in asks for a worker: JSON of what to change in its environment, and along with
it the worker's own socket. The packet out is the worker's pid. A worker becomes the child of `baton serve`, which
adopts orphans, so it outlives this process; when `baton serve` is gone both are.

Of a process's threads only the one that forks goes on in the child, and locks that others held stay locked. So this
process has one alone: importing starts no pool of OpenMP's, no gRPC and no CUDA. Where a library of the user's starts a
thread all the same, workers are begun anew instead of forked.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable, Mapping

from baton import tether
from deploy import worker_process
from deploy.hosting import import_quickly

MAX_REQUEST_BYTES = 65536


def main() -> None:
    descriptor, parent_pid, *modules = sys.argv[1:]
    control = socket.socket(fileno=int(descriptor))
    for module in modules:
        # What is wrong with it the worker meets, and tells, when it imports it itself.
        with contextlib.suppress(Exception):
            import_quickly(module)
    # The collector would write to every object, and so copy every page that workers share.
    gc.freeze()
    while True:
        request, descriptors, _, _ = socket.recv_fds(control, MAX_REQUEST_BYTES, 1)
        if not request:
            return
        with socket.socket(fileno=descriptors[0]) as own:
            work = functools.partial(_work, own, control, json.loads(request), is_alone=_num_threads() == 1)
            pid = _fork_orphan(work, int(parent_pid))
        control.send(str(pid).encode())


def _work(own: socket.socket, control: socket.socket, environment: Mapping[str, str], *, is_alone: bool) -> int:
    """A worker's process.

    It is of the server's group until orders come, which tell that its pid has been told: whoever collects that group
    so collects those of which nobody knows.
    """
    control.close()
    try:
        if not own.recv(1, socket.MSG_PEEK):
            return 1
    except ConnectionResetError:
        return 1
    os.setsid()
    os.environ.update(environment)
    if not is_alone:
        os.set_inheritable(own.fileno(), True)
        os.execv(sys.executable, [sys.executable, "-P", "-m", "deploy.worker_process", str(own.fileno())])
    return worker_process.run(own)


def _num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _fork_orphan(child: Callable[[], int], parent_pid: int) -> int:
    """Forks a process that runs `child`, tied to `parent_pid`, which has adopted it when this returns its pid.

    It is forked by a process that ends at once, and waits until that has been reaped: only then is it an orphan.
    """
    ours, theirs = socket.socketpair()

    def orphan() -> int:
        ours.close()
        return child() if _is_released(theirs) and tether.tie(parent_pid) else 1

    def between() -> int:
        pid = _fork(orphan)
        # Where this process has been killed meanwhile, nobody is left to be told; the orphan finds that out too.
        with contextlib.suppress(ConnectionError):
            theirs.sendall(str(pid).encode())
        return 0

    with ours:
        with theirs:
            between_pid = _fork(between)
        pid = int(ours.recv(32))
        os.waitpid(between_pid, 0)
        ours.sendall(b"\n")
        return pid


def _is_released(forker: socket.socket) -> bool:
    """Waits for the word to go on; False where whoever would give it has been killed."""
    try:
        return bool(forker.recv(1))
    except ConnectionResetError:
        # It was killed before it had read all that this socket held for it.
        return False


def _fork(child: Callable[[], int]) -> int:
    """Forks a process that runs `child` and ends with the exit status that it returns."""
    if pid := os.fork():
        return pid
    exit_code = 1
    try:
        exit_code = child()
    except BaseException:
        traceback.print_exc()
    finally:
        worker_process.end(exit_code)


if __name__ == "__main__":
    main()
