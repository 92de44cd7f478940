"""Ties a process to its parent, then becomes the command it was given: `python tether.py PARENT_PID COMMAND...`.

Run by `deploy.child` and `worker.ranks.team` in a bare interpreter (`-I -S`), since code between fork and exec is
unsafe in a parent with threads. On Linux the kernel then kills the process when its parent dies, or the thread of it
that made the process, however that happens; exec keeps the tie.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def tie(parent_pid: int) -> bool:
    """Ties this process to its parent; False where that is gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have died before the tie was made.
    return os.getppid() == parent_pid


def main() -> None:
    parent_pid, *command = sys.argv[1:]
    if tie(int(parent_pid)):
        os.execv(command[0], command)


if __name__ == "__main__":
    main()
