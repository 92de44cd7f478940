"""Keeps the wanted number of workers of each role alive, and publishes who they are.

The only restarter of workers. Each incarnation has an epoch of its own, counted over the whole cluster. Lives on one
event loop: of `baton serve` in the process runtime, of a Ray actor in the Ray runtime.
"""

from __future__ import annotations

import asyncio
import itertools
import logging

from baton.config import Role, ServeConfig, worker_config
from deploy.backoff import Backoff, BackoffPolicy
from deploy.errors import StartError
from deploy.membership import Membership, MembershipServer
from deploy.runtimes.base import WorkerHandle, WorkerRuntime

_log = logging.getLogger(__name__)


def worker_names(config: ServeConfig) -> list[tuple[Role, str]]:
    """Role and name of every wanted worker."""
    wanted: list[tuple[Role, int]] = [
        ("prefill", config.cluster.prefill_workers),
        ("decode", config.cluster.decode_workers),
    ]
    return [(role, f"{role}-{index}") for role, count in wanted for index in range(count)]


class Supervisor:
    """One keeper task for each wanted worker: start, join, wait for death, leave, again."""

    def __init__(
        self,
        config: ServeConfig,
        runtime: WorkerRuntime,
        backoff: BackoffPolicy | None = None,
        *,
        host: str = "127.0.0.1",
    ) -> None:
        """
        Args:
            host: address that the Membership service listens on.
        """
        self._config = config
        self._runtime = runtime
        self._backoff = backoff or BackoffPolicy()
        self._membership = Membership()
        self._server = MembershipServer(self._membership, host)
        self._epochs = itertools.count(1)
        self._workers: dict[str, WorkerHandle] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._stopped = asyncio.Event()

    async def start(self) -> str:
        """Begins to start the workers, all at once, and returns the address of the Membership service."""
        address = await self._server.start()
        self._keepers = [asyncio.create_task(self._keep(role, name)) for role, name in worker_names(self._config)]
        return address

    async def wait_stopped(self) -> None:
        """Returns once `stop` was called; raises what a keeper failed with, a StartError on first start."""
        stopped = asyncio.create_task(self._stopped.wait())
        try:
            done, _ = await asyncio.wait([stopped, *self._keepers], return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
        if not self._stopped.is_set():
            for keeper in done:
                keeper.result()

    async def stop(self, drain_s: float) -> None:
        """Drains and stops every worker, and ends the service."""
        await self.let_go()
        await asyncio.gather(*(worker.stop(drain_s) for worker in self._workers.values()))

    async def let_go(self) -> None:
        """Keeps and publishes nothing any more; workers that have started are left to their runtime. Idempotent."""
        self._stopped.set()
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await self._server.stop()

    async def _keep(self, role: Role, name: str) -> None:
        backoff = Backoff(self._backoff)
        loop = asyncio.get_running_loop()
        self._workers[name] = await self._start(role, name)
        while True:
            started = loop.time()
            worker = self._workers[name]
            self._membership.join(worker.info)
            how = await worker.wait_dead()
            del self._workers[name]
            self._membership.leave(worker.info)
            _log.warning("%s (epoch %d) died: %s", name, worker.info.epoch, how)
            await asyncio.sleep(backoff.delay_s(loop.time() - started))
            self._workers[name] = await self._restart(role, name, backoff)

    async def _restart(self, role: Role, name: str, backoff: Backoff) -> WorkerHandle:
        while True:
            try:
                return await self._start(role, name)
            except StartError as error:
                delay_s = backoff.delay_s(lived_s=0)
                _log.warning("%s; trying again in %.1f s", error, delay_s)
                await asyncio.sleep(delay_s)

    async def _start(self, role: Role, name: str) -> WorkerHandle:
        return await self._runtime.start(worker_config(self._config, role, name, next(self._epochs)))
