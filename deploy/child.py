"""Processes that die with this one: how the router and, without Ray, the workers are run. Used on the event loop."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Protocol

from baton import tether

STDERR = 2


class Process(Protocol):
    """A child process, as asyncio's own are."""

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> int | None: ...

    async def wait(self) -> int: ...

    def kill(self) -> None: ...


async def spawn_module(
    module: str,
    *arguments: str,
    pass_fds: Sequence[int] = (),
    environment: Mapping[str, str] | None = None,
    stdout: int = STDERR,
) -> asyncio.subprocess.Process:
    """Runs `python -m module` tied to this process, which must call from a thread that lasts (the main one).

    The child has a session of its own, so that Ctrl-C reaches this process alone. It inherits stderr, and its stdout is
    the same unless told otherwise.
    """
    # -P: a folder named like one of our packages in the working directory must not be taken for it.
    command = [sys.executable, "-P", "-m", module, *arguments]
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-I", "-S", tether.__file__, str(os.getpid())),
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=stdout,
        pass_fds=pass_fds,
        env=environment,
        start_new_session=True,
    )


async def kill(process: Process) -> None:
    """Ends a process at once, if it has not ended, and reaps it."""
    if process.returncode is None:
        process.kill()
    await process.wait()


def describe_exit(returncode: int) -> str:
    """A return code in words."""
    if returncode < 0:
        return f"killed by {signal.Signals(-returncode).name}"
    return f"exit status {returncode}"
