"""Workers as plain processes of this machine, children of `baton serve`, in which the supervisor lives as well."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Mapping

from baton.config import Role, ServeConfig, WorkerConfig, num_ranks, worker_host
from baton.internal.v1 import worker_pb2
from deploy import child
from deploy.errors import StartError
from deploy.hosting import read_report
from deploy.runtimes.base import STOP_GRACE_S
from deploy.runtimes.gpus import GpuDealer
from deploy.runtimes.launchers import make_launcher
from deploy.supervisor import Supervisor


class ProcessWorker:
    """A worker process and the socket to it."""

    def __init__(self, info: worker_pb2.WorkerInfo, process: child.Process, orders: asyncio.StreamWriter) -> None:
        self._info = info
        self._process = process
        self._orders = orders

    @property
    def info(self) -> worker_pb2.WorkerInfo:
        return self._info

    def is_alive(self) -> bool:
        return self._process.returncode is None

    async def wait_dead(self) -> str:
        how = child.describe_exit(await self._process.wait())
        await _close(self._orders)
        return how

    async def stop(self, drain_s: float) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):
            self._orders.write(json.dumps({"drain_s": drain_s}).encode() + b"\n")
            await self._orders.drain()
            await asyncio.wait_for(self._process.wait(), drain_s + STOP_GRACE_S)
        await self.kill()

    async def kill(self) -> None:
        await child.kill(self._process)
        await self.wait_dead()


class ProcessRuntime:
    """Starts worker processes, and knows those that run."""

    def __init__(self, actors: Mapping[Role, str], *, num_ranks: int = 1) -> None:
        """`num_ranks`: of all workers together."""
        self._actors = actors
        self._launcher = make_launcher(actors.values())
        self._gpus = GpuDealer(os.environ, num_ranks=num_ranks)
        self._workers: list[ProcessWorker] = []

    async def open(self) -> None:
        """Begins what does not depend on a worker's configuration."""
        await self._launcher.start()

    async def start(self, config: WorkerConfig) -> ProcessWorker:
        config = self._gpus.limit_memory(config)
        ours, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as undo:
            undo.enter_context(ours)
            process = await self._launcher.launch(theirs, self._gpus.environment(config))
            reports, orders = await asyncio.open_connection(sock=ours)
            # From here on the transport closes it.
            undo.pop_all()
        try:
            order = {"actor": self._actors[config.role], "config": config.model_dump(mode="json")}
            orders.write(json.dumps(order).encode() + b"\n")
            # A worker that dies closes its end.
            with contextlib.suppress(ConnectionError):
                if report := await reports.readline():
                    worker = ProcessWorker(read_report(config.name, report), process, orders)
                    self._workers.append(worker)
                    await self._forget_dead()
                    return worker
            raise StartError(f"{config.name} died while starting ({child.describe_exit(await process.wait())})")
        except BaseException:
            # First, and without waiting: this may be cancelled once more.
            orders.close()
            await child.kill(process)
            await _close(orders)
            raise

    async def _forget_dead(self) -> None:
        """Closes the sockets of workers that have died, whoever watched them."""
        for worker in [worker for worker in self._workers if not worker.is_alive()]:
            await worker.wait_dead()
            # Another start may have forgotten it meanwhile.
            with contextlib.suppress(ValueError):
                self._workers.remove(worker)

    async def close(self) -> None:
        """Ends at once every worker that has started; no start may be under way."""
        await asyncio.gather(*(worker.kill() for worker in self._workers))
        await self._launcher.close()


async def _close(orders: asyncio.StreamWriter) -> None:
    """Closes the socket and waits for it, so that the event loop may end right afterwards."""
    orders.close()
    with contextlib.suppress(ConnectionError):
        await orders.wait_closed()


class ProcessHost:
    """Runs the cluster as children of this process."""

    def __init__(self, config: ServeConfig, actors: Mapping[Role, str]) -> None:
        self._config = config
        self._runtime = ProcessRuntime(actors, num_ranks=num_ranks(config))
        self._supervisor: Supervisor | None = None

    async def open(self) -> None:
        await self._runtime.open()

    def supervisor(self) -> Supervisor:
        self._supervisor = Supervisor(self._config, self._runtime, host=worker_host(self._config.cluster))
        return self._supervisor

    async def close(self) -> None:
        if self._supervisor is not None:
            await self._supervisor.let_go()
        await self._runtime.close()
