"""`baton serve`: a host, a supervisor in it, the router beside it, and the order in which they come and go.

1. What can be checked beforehand is.
2. The host opens (Ray starts).
3. The supervisor starts all workers at once, and the router starts meanwhile.
4. When the router says SERVING the ready file is written.
5. Membership and router are followed.
6. On a signal the router drains, then the workers, then the host closes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import grpc.aio

from baton import logs
from baton.config import ServeConfig, router_process_config
from baton.internal.v1 import worker_pb2
from deploy import preflight, settings
from deploy.environment import usable_cpus
from deploy.errors import ClusterError, ServeError
from deploy.membership import follow_membership
from deploy.progress import Progress
from deploy.ready_file import ReadyFile
from deploy.router_process import RouterAddresses, RouterProcess
from deploy.runtimes import make_host
from deploy.runtimes.base import Host, RunningSupervisor
from deploy.signals import StopSignals
from deploy.supervisor import worker_names


async def serve(
    config: ServeConfig,
    progress: Progress,
    *,
    host_for: Callable[[ServeConfig], Host] = make_host,
    router_module: str = "router",
) -> bool:
    """Serves until SIGINT or SIGTERM; returns when everything has ended in order and nothing is left.

    Returns:
        False where SIGINT came before the first request could be served.

    Raises:
        ServeError: it could not start or go on; nothing is left then either.
    """
    preflight.check(config)
    logs.configure(config.log, role="serve")
    config = settings.resolve(config, usable_cpus())
    threads = config.model.num_threads
    progress.step(f"{threads or 'all'} thread{'' if threads == 1 else 's'} a worker")
    with StopSignals() as signals:
        cluster = ServedCluster(config, host_for(config), progress, router_module, take_signals=signals.take)
        try:
            await until(signals.requested, cluster.run())
            if cluster.is_ready:
                progress.step("draining; again to stop at once")
                await until(signals.forced, cluster.stop())
            else:
                progress.step("stopping")
        finally:
            await cluster.close()
    progress.step("stopped")
    return cluster.is_ready or not signals.interrupted


class ServedCluster:
    """Everything that one `baton serve` runs."""

    def __init__(
        self,
        config: ServeConfig,
        host: Host,
        progress: Progress,
        router_module: str,
        *,
        take_signals: Callable[[], None],
    ) -> None:
        self._config = config
        self._host = host
        self._progress = progress
        self._router_module = router_module
        self._take_signals = take_signals
        self._ready_file = ReadyFile(config.ready_file) if config.ready_file else None
        self._members: dict[str, worker_pb2.WorkerInfo] = {}
        self._never_up = {name for _, name in worker_names(config)}
        self._both_roles = asyncio.Event()
        self._addresses: RouterAddresses | None = None
        self._supervisor: RunningSupervisor | None = None
        self._router: RouterProcess | None = None

    @property
    def is_ready(self) -> bool:
        """Whether the first request could be served."""
        return self._addresses is not None

    async def run(self) -> None:
        """Starts everything and watches over it until cancelled, which leaves it running.

        Raises:
            ServeError: something could not start or is gone for good.
        """
        if self._config.cluster.runtime == "ray":
            address = self._config.cluster.ray_address
            self._progress.step(f"joining Ray at {address}" if address else "starting Ray")
        await self._host.open()
        # Ray's own handlers would print a stack for an orderly SIGTERM.
        self._take_signals()
        self._progress.step(f"loading model on {', '.join(name for _, name in worker_names(self._config))}")
        self._supervisor = self._host.supervisor()
        membership = await self._supervisor.start()
        router_config = router_process_config(self._config, membership)
        self._router = RouterProcess(router_config, self._router_died, module=self._router_module)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._supervisor.wait_stopped())
                tasks.create_task(self._router.run())
                tasks.create_task(self._follow(membership))
                tasks.create_task(self._announce(self._router))
        except* ServeError as group:
            raise _first(group) from None

    async def stop(self) -> None:
        """Drains and ends router and workers in order."""
        assert self._router is not None
        assert self._supervisor is not None
        self._remove_ready_file()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._config.cluster.drain_s
        await self._router.stop(self._config.cluster.drain_s)
        await self._supervisor.stop(max(0.0, deadline - loop.time()))

    async def close(self) -> None:
        """Ends at once what still runs."""
        self._remove_ready_file()
        if self._router is not None:
            await self._router.kill()
        await self._host.close()

    async def _announce(self, router: RouterProcess) -> None:
        addresses = await router.wait_serving()
        # The router may have heard of its workers before this process did.
        await self._both_roles.wait()
        self._addresses = addresses
        self._write_ready_file()
        self._progress.ready(addresses)
        self._tell_when_complete()

    async def _follow(self, membership: str) -> None:
        try:
            async for view in follow_membership(membership):
                before, self._members = self._members, {worker.name: worker for worker in view.workers}
                self._write_ready_file()
                self._tell_changes(before)
                self._tell_when_complete()
                if {worker.role for worker in view.workers} >= {"prefill", "decode"}:
                    self._both_roles.set()
        except grpc.aio.AioRpcError as error:
            raise ClusterError(f"lost the supervisor ({error.details()})") from error

    def _tell_changes(self, before: Mapping[str, worker_pb2.WorkerInfo]) -> None:
        epochs = {worker.epoch for worker in self._members.values()}
        for name, worker in before.items():
            if worker.epoch not in epochs:
                self._progress.step(f"{name} died; starting another")
        epochs = {worker.epoch for worker in before.values()}
        for name, worker in self._members.items():
            if worker.epoch not in epochs:
                self._progress.step(f"{name} is up (epoch {worker.epoch}, pid {worker.pid})")

    def _tell_when_complete(self) -> None:
        if self.is_ready and self._never_up:
            self._never_up -= set(self._members)
            if not self._never_up:
                self._progress.complete(len(self._members))

    def _router_died(self, how: str) -> None:
        self._progress.step(f"the router died ({how}); starting another")

    def _write_ready_file(self) -> None:
        if self._ready_file is not None and self._addresses is not None:
            self._ready_file.write(self._addresses, list(self._members.values()))

    def _remove_ready_file(self) -> None:
        if self._ready_file is not None:
            self._ready_file.remove()


async def until(event: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Runs `work` until it ends or, if that is earlier, cancels it when `event` is set."""
    task = asyncio.create_task(work)
    waiting = asyncio.create_task(event.wait())
    try:
        await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait([task])
    if not task.cancelled():
        task.result()


def _first(group: BaseExceptionGroup[ServeError]) -> ServeError:
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
