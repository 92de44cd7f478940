"""Workers and supervisor as Ray actors, in a local Ray of this process's own or in a cluster that runs already.

Ray places and ships; it restarts nothing, and no KV goes through its object store.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from baton.config import ClusterConfig, Role, ServeConfig, WorkerConfig
from baton.internal.v1 import worker_pb2
from deploy.errors import ClusterError, StartError
from deploy.hosting import HostedWorker, read_report
from deploy.reaper import Reaper
from deploy.runtimes.base import STOP_GRACE_S
from deploy.supervisor import Supervisor

OBJECT_STORE_BYTES = 80 << 20
PROBE_TIMEOUT_S = 5.0
LONGEST_FOLDER = 24


class WorkerActor:
    """Body of a worker's Ray actor. Methods run on threads of its own, so that `stop` works while `start` runs."""

    def __init__(self, actor: str, config_json: str) -> None:
        self._worker = HostedWorker(actor, config_json)
        self._stopped = threading.Event()

    def start(self) -> str:
        return self._worker.start()

    def hold(self) -> None:
        """Returns when the worker was stopped. A pending call fails as soon as Ray sees the process die."""
        self._stopped.wait()

    def stop(self, drain_s: float) -> None:
        self._worker.stop(drain_s)
        self._stopped.set()


class RayWorker:
    """A worker's actor."""

    def __init__(self, info: worker_pb2.WorkerInfo, actor: Any) -> None:
        self._info = info
        self._actor = actor
        self._held = actor.hold.remote()

    @property
    def info(self) -> worker_pb2.WorkerInfo:
        return self._info

    async def wait_dead(self) -> str:
        try:
            await self._held
        except ray.exceptions.RayActorError as error:
            return _first_line(error)
        return "stopped"

    async def stop(self, drain_s: float) -> None:
        with contextlib.suppress(ray.exceptions.RayActorError, TimeoutError):
            await asyncio.wait_for(_result(self._actor.stop.remote(drain_s)), drain_s + STOP_GRACE_S)
        await self.kill()

    async def kill(self) -> None:
        ray.kill(self._actor, no_restart=True)
        await self.wait_dead()


class RayRuntime:
    """Starts worker actors; used inside the supervisor's actor, which owns them."""

    def __init__(self, cluster: ClusterConfig, actors: Mapping[Role, str]) -> None:
        self._actors = actors
        self._actor_class = ray.remote(
            num_cpus=cluster.ray_worker_cpus,
            num_gpus=cluster.ray_worker_gpus,
            max_restarts=0,
            max_concurrency=4,
            scheduling_strategy="SPREAD",
        )(WorkerActor)

    async def start(self, config: WorkerConfig) -> RayWorker:
        actor = self._actor_class.options(name=f"{config.name}/{config.epoch}").remote(
            self._actors[config.role], config.model_dump_json()
        )
        try:
            return RayWorker(read_report(config.name, await actor.start.remote()), actor)
        except ray.exceptions.RayError as error:
            raise StartError(f"{config.name} died while starting ({_first_line(error)})") from error
        except BaseException:
            ray.kill(actor, no_restart=True)
            raise


class SupervisorActor:
    """Body of the supervisor's Ray actor."""

    def __init__(self, config_json: str, actors: dict[Role, str]) -> None:
        config = ServeConfig.model_validate_json(config_json)
        self._supervisor = Supervisor(config, RayRuntime(config.cluster, actors))

    async def start(self) -> str:
        return await self._supervisor.start()

    async def wait_stopped(self) -> None:
        await self._supervisor.wait_stopped()

    async def stop(self, drain_s: float) -> None:
        await self._supervisor.stop(drain_s)


class RaySupervisor:
    """The supervisor's actor, as `baton serve` holds it."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def start(self) -> str:
        address: str = await self._call(self._actor.start.remote())
        return address

    async def wait_stopped(self) -> None:
        await self._call(self._actor.wait_stopped.remote())

    async def stop(self, drain_s: float) -> None:
        await self._call(self._actor.stop.remote(drain_s))

    async def _call(self, reference: Any) -> Any:
        try:
            return await reference
        except ray.exceptions.RayTaskError as error:
            # The text of Ray's error is the remote traceback; ours is for the user.
            raise (error.cause if isinstance(error.cause, StartError) else error) from None
        except ray.exceptions.RayActorError as error:
            raise ClusterError(f"the supervisor died ({_first_line(error)})") from error


class RayHost:
    """A local Ray for the time that this is open, or a connection to the cluster at `ray_address`."""

    def __init__(self, config: ServeConfig, actors: Mapping[Role, str]) -> None:
        self._config = config
        self._actors = actors
        self._address = config.cluster.ray_address
        # Ray's processes are tied to the thread that starts them, so it must last as long as they.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ray")
        self._initialising: asyncio.Future[None] | None = None
        self._reaper: Reaper | None = None
        self._daemons: list[psutil.Process] = []
        self._supervisor: Any = None

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        self._initialising = loop.run_in_executor(self._thread, self._initialise)
        # It cannot be interrupted; `close` waits for it.
        await asyncio.shield(self._initialising)

    def supervisor(self) -> RaySupervisor:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor_class = ray.remote(num_cpus=0, max_restarts=0, scheduling_strategy=here)(SupervisorActor)
        self._supervisor = actor_class.remote(self._config.model_dump_json(), dict(self._actors))
        return RaySupervisor(self._supervisor)

    async def close(self) -> None:
        if self._initialising is None:
            return
        with contextlib.suppress(StartError):
            await self._initialising
        await asyncio.get_running_loop().run_in_executor(self._thread, self._shut_down)
        self._thread.shutdown()
        self._initialising = None

    def _initialise(self) -> None:
        quiet: dict[str, Any] = {
            "log_to_driver": self._config.log.level == "debug",
            "logging_level": logging.ERROR,
        }
        try:
            if self._address is None:
                folder = _make_folder()
                self._reaper = Reaper(folder)
                before = psutil.Process().children()
                ray.init(
                    address="local",
                    object_store_memory=OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    _temp_dir=folder,
                    **quiet,
                )
                self._daemons = [child for child in psutil.Process().children() if child not in before]
                self._reaper.watch(_families(self._daemons))
            else:
                _probe(self._address)
                ray.init(address=self._address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = f"--ray-address {self._address}" if self._address else "Ray does not start"
            raise StartError(f"{where}: {_first_line(error)}") from error

    def _shut_down(self) -> None:
        if self._supervisor is not None:
            # The workers' actors are the supervisor's and go with it.
            ray.kill(self._supervisor, no_restart=True)
        if self._reaper is not None:
            self._reaper.watch(_families(self._daemons))
        ray.shutdown()
        if self._reaper is not None:
            self._reaper.reap()


async def _result(reference: Any) -> None:
    await reference


def _make_folder() -> str:
    """A folder for Ray's logs and sockets; the path of a socket in it may have no more than 107 bytes."""
    usual = tempfile.gettempdir()
    return tempfile.mkdtemp(prefix="baton-ray-", dir=usual if len(usual) <= LONGEST_FOLDER else "/tmp")


def _families(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """The processes and all that descend from them."""
    members = list(processes)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            members += process.children(recursive=True)
    return members


def _probe(address: str) -> None:
    """Fails at once where Ray itself would try for a minute."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=PROBE_TIMEOUT_S).close()
    except OSError as error:
        raise ConnectionError(f"Ray is not reachable ({error.strerror or error})") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
