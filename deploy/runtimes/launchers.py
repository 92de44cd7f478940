"""How the process runtime makes a worker's process: forked where the system allows, else begun anew."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping
from typing import Protocol

from deploy import child
from deploy.environment import worker_environment
from deploy.runtimes.forking import ForkServer, can_fork


class Launcher(Protocol):
    async def start(self) -> None:
        """Begins what takes long and is the same for all workers."""
        ...

    async def launch(self, own: socket.socket, environment: Mapping[str, str]) -> child.Process:
        """A process with `own` that waits for orders, and ends when the other end of that is closed.

        Args:
            environment: what the worker's has in place of, or beyond, the common one.

        Raises:
            StartError: there is none to be had.
        """
        ...

    async def close(self) -> None:
        """Ends what `start` began; to be called when no worker runs. Idempotent."""
        ...


class Spawner:
    """Begins a Python interpreter for each worker."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    async def start(self) -> None:
        """Nothing is shared."""

    async def launch(self, own: socket.socket, environment: Mapping[str, str]) -> child.Process:
        return await child.spawn_module(
            "deploy.worker_process",
            str(own.fileno()),
            pass_fds=[own.fileno()],
            environment={**self._environment, **environment},
        )

    async def close(self) -> None:
        """Nothing is shared."""


def make_launcher(actors: Iterable[str]) -> Launcher:
    """The best launcher of workers that are one of the `actors` ("module:Class")."""
    if not can_fork():
        return Spawner(worker_environment())
    return ForkServer(sorted({actor.partition(":")[0] for actor in actors}), worker_environment())
