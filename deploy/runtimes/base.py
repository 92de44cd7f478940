"""The seams between `baton serve`, the supervisor and what runs their processes.

A `Host` is where a cluster lives; it gives `baton serve` a `RunningSupervisor`. The supervisor starts each worker
through a `WorkerRuntime` and holds its `WorkerHandle`. All are used on one event loop.
"""

from __future__ import annotations

from typing import Protocol

from baton.config import WorkerConfig
from baton.internal.v1 import worker_pb2

# What a worker gets beyond its drain before it is killed.
STOP_GRACE_S = 5.0


class WorkerHandle(Protocol):
    """One incarnation of a worker that has started."""

    @property
    def info(self) -> worker_pb2.WorkerInfo: ...

    async def wait_dead(self) -> str:
        """Returns when the process has ended, with how, in a few words. May be awaited by several."""
        ...

    async def stop(self, drain_s: float) -> None:
        """Lets running requests end within `drain_s`, then ends the process. Fine for a dead worker."""
        ...

    async def kill(self) -> None:
        """Ends the process at once. Fine for a dead worker."""
        ...


class WorkerRuntime(Protocol):
    async def start(self, config: WorkerConfig) -> WorkerHandle:
        """Starts a worker and waits until it serves. Cancelling ends its process.

        Raises:
            StartError: the worker said why it cannot start, or died.
        """
        ...


class RunningSupervisor(Protocol):
    """A supervisor, wherever it runs."""

    async def start(self) -> str:
        """Begins to start the workers, and returns the address of the Membership service."""
        ...

    async def wait_stopped(self) -> None:
        """Returns once `stop` was called.

        Raises:
            StartError: a worker failed the first time that it was started.
            ClusterError: the supervisor is gone.
        """
        ...

    async def stop(self, drain_s: float) -> None:
        """Drains and stops every worker."""
        ...


class Host(Protocol):
    async def open(self) -> None:
        """Makes ready to run processes.

        Raises:
            StartError: it cannot.
        """
        ...

    def supervisor(self) -> RunningSupervisor:
        """Makes the cluster's supervisor, not yet started. Called once, after `open`."""
        ...

    async def close(self) -> None:
        """Ends at once what still runs, and leaves nothing behind. Idempotent; fine in any state."""
        ...
