"""Ends what a local Ray leaves when the process that started it is gone: `python -m deploy.reaper`.

Ray's agents notice that their raylet died, but then try for a minute to tell a control store that died with it. Lines
of JSON on stdin say what to end, the last one counts: {"folder": path, "processes": [[pid, start time], ...]}. The end
of stdin is the order, whether it was closed or its writer was killed.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence

import psutil

EXIT_TIMEOUT_S = 10.0


class Reaper:
    """The starter's side. It outlives its starter, so it is tied to nothing but the pipe."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "deploy.reaper"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        self.watch([])

    @property
    def pid(self) -> int:
        return self._process.pid

    def watch(self, processes: Sequence[psutil.Process]) -> None:
        """Sets which processes are to end, in place of those named before."""
        named = []
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                named.append([process.pid, process.create_time()])
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"folder": self._folder, "processes": named}) + "\n")
        self._process.stdin.flush()

    def reap(self) -> None:
        """Ends them now, removes the folder, and waits for both."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    *_, last = sys.stdin
    order = json.loads(last)
    ending = []
    for pid, started in order["processes"]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            # The pid may belong to another process by now.
            if process.create_time() == started:
                process.kill()
                ending.append(process)
    psutil.wait_procs(ending, timeout=EXIT_TIMEOUT_S)
    shutil.rmtree(order["folder"], ignore_errors=True)


if __name__ == "__main__":
    main()
