"""Workers and supervisor as Ray actors.

Ray places and ships; it restarts nothing, and no KV goes through its object store.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
from collections.abc import Mapping
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from baton import logs
from baton.config import Role, ServeConfig, WorkerConfig, worker_host
from baton.internal.v1 import worker_pb2
from deploy.errors import ClusterError, StartError
from deploy.hosting import HostedWorker, read_report
from deploy.installation import describe_problem, installed_versions
from deploy.placement import Node, Placed, Request, choose, describe_lack, limit_memory, make_request
from deploy.runtimes.base import STOP_GRACE_S
from deploy.supervisor import Supervisor

# How often it is said that a worker still waits for a node.
NODE_NOTICE_S = 60.0

_log = logging.getLogger(__name__)


class WorkerActor:
    """Body of a worker's Ray actor. Methods run on threads of its own, so that `stop` works while `start` runs."""

    def __init__(self, actor: str, config_json: str, versions: Mapping[str, str]) -> None:
        config = WorkerConfig.model_validate_json(config_json)
        self._config = config.model_copy(update={"host": on_this_node(config.host)})
        self._worker = HostedWorker(actor, self._config.model_dump_json())
        self._versions = versions
        self._stopped = threading.Event()

    def node_id(self) -> str:
        """Of the node that Ray put this on."""
        return str(ray.get_runtime_context().get_node_id())

    def start(self) -> str:
        if problem := describe_problem(self._versions, self._config.model.path):
            return json.dumps({"error": f"node {ray.util.get_node_ip_address()}: {problem}"})
        return self._worker.start()

    def hold(self) -> None:
        """Returns when the worker was stopped. A pending call fails as soon as Ray sees the process die."""
        self._stopped.wait()

    def stop(self, drain_s: float) -> None:
        self._worker.stop(drain_s)
        self._stopped.set()


class RayWorker:
    """A worker's actor."""

    def __init__(self, info: worker_pb2.WorkerInfo, actor: Any, placed: Placed) -> None:
        self.placed = placed
        self.is_alive = True
        self._info = info
        self._actor = actor
        self._held = actor.hold.remote()

    @property
    def info(self) -> worker_pb2.WorkerInfo:
        return self._info

    async def wait_dead(self) -> str:
        try:
            await self._held
            return "stopped"
        except ray.exceptions.RayActorError as error:
            return first_line(error)
        finally:
            self.is_alive = False

    async def stop(self, drain_s: float) -> None:
        with contextlib.suppress(ray.exceptions.RayActorError, TimeoutError):
            await asyncio.wait_for(_result(self._actor.stop.remote(drain_s)), drain_s + STOP_GRACE_S)
        await self.kill()

    async def kill(self) -> None:
        ray.kill(self._actor, no_restart=True)
        await self.wait_dead()


class RayRuntime:
    """Starts worker actors, each on a node of its choice; used inside the supervisor's actor, which owns them."""

    def __init__(self, config: ServeConfig, actors: Mapping[Role, str]) -> None:
        self._actors = actors
        self._actor_class = ray.remote(WorkerActor)
        nodes = alive_nodes()
        roles: tuple[Role, ...] = ("prefill", "decode")
        self._requests = {role: make_request(config, role, nodes) for role in roles}
        self._starting: dict[str, Placed] = {}
        self._workers: list[RayWorker] = []

    async def start(self, config: WorkerConfig) -> RayWorker:
        request = self._requests[config.role]
        name = f"{config.name}/{config.epoch}"
        actor = self._place(name, request, config)
        try:
            node_id = await self._await_node(config.name, request, actor)
            report = await actor.start.remote()
            worker = RayWorker(read_report(config.name, report), actor, Placed(node_id, request))
            self._workers = [*(worker for worker in self._workers if worker.is_alive), worker]
            return worker
        except ray.exceptions.RayError as error:
            raise StartError(f"{config.name} died while starting ({_describe_death(error)})") from error
        except BaseException:
            ray.kill(actor, no_restart=True)
            raise
        finally:
            self._starting.pop(name, None)

    def _place(self, name: str, request: Request, config: WorkerConfig) -> Any:
        """Makes the actor: on the node that suits best, else on the first that Ray finds to fit."""
        nodes = alive_nodes()
        node = choose(nodes, request, self._placed())
        where: dict[str, Any]
        if node is not None:
            self._starting[name] = Placed(node.id, request)
            where = {"scheduling_strategy": NodeAffinitySchedulingStrategy(node.id, soft=False)}
        else:
            _log.warning("%s waits: %s", config.name, describe_lack(request, nodes, self._placed()))
            where = {"scheduling_strategy": "SPREAD", "label_selector": dict(request.labels)}
        custom = {kind: amount for kind, amount in request.resources.items() if kind not in ("CPU", "GPU")}
        actor_class = self._actor_class.options(
            name=name,
            num_cpus=request.resources.get("CPU", 0),
            num_gpus=request.resources.get("GPU", 0),
            resources=custom,
            max_restarts=0,
            max_concurrency=4,
            **where,
        )
        config = limit_memory(config, request)
        return actor_class.remote(self._actors[config.role], config.model_dump_json(), installed_versions())

    async def _await_node(self, name: str, request: Request, actor: Any) -> str:
        """Returns the node's id when the actor runs there; says now and then what it waits for."""
        placing = asyncio.ensure_future(_result(actor.node_id.remote()))
        while not (await asyncio.wait([placing], timeout=NODE_NOTICE_S))[0]:
            _log.warning("%s still waits for a node with %s", name, request)
        return str(placing.result())

    def _placed(self) -> list[Placed]:
        return [*self._starting.values(), *(worker.placed for worker in self._workers if worker.is_alive)]


class Notices(logging.Handler):
    """Keeps what the supervisor warns of for `baton serve`: its own output goes to a file of Ray's."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._loop = asyncio.get_running_loop()
        self._texts: asyncio.Queue[str] = asyncio.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        self._loop.call_soon_threadsafe(self._texts.put_nowait, record.getMessage())

    async def next(self) -> str:
        return await self._texts.get()


class SupervisorActor:
    """Body of the supervisor's Ray actor."""

    def __init__(self, config_json: str, actors: dict[Role, str]) -> None:
        self._config = ServeConfig.model_validate_json(config_json)
        self._actors = actors

    async def start(self) -> str:
        logs.configure(self._config.log, role="supervisor")
        self._notices = Notices()
        logging.getLogger("deploy").addHandler(self._notices)
        host = on_this_node(worker_host(self._config.cluster))
        self._supervisor = Supervisor(self._config, RayRuntime(self._config, self._actors), host=host)
        return await self._supervisor.start()

    async def next_notice(self) -> str:
        """The next warning, when there is one."""
        return await self._notices.next()

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
        telling = asyncio.create_task(self._tell())
        try:
            await self._call(self._actor.wait_stopped.remote())
        finally:
            telling.cancel()

    async def stop(self, drain_s: float) -> None:
        await self._call(self._actor.stop.remote(drain_s))

    async def _tell(self) -> None:
        """Passes the supervisor's warnings on."""
        with contextlib.suppress(ray.exceptions.RayError):
            while True:
                _log.warning(await self._actor.next_notice.remote())

    async def _call(self, reference: Any) -> Any:
        try:
            return await reference
        except ray.exceptions.RayTaskError as error:
            # The text of Ray's error is the remote traceback; ours is for the user.
            raise (error.cause if isinstance(error.cause, StartError) else error) from None
        except ray.exceptions.RayActorError as error:
            raise ClusterError(f"the supervisor died ({_describe_death(error)})") from error


def alive_nodes() -> list[Node]:
    """The nodes of the cluster that Ray takes for alive."""
    return [
        Node(node["NodeID"], node["NodeManagerAddress"], node["Resources"], node["Labels"])
        for node in ray.nodes()
        if node["Alive"]
    ]


def first_line(error: BaseException) -> str:
    """The part of a Ray error's text that is not a traceback."""
    return str(error).strip().partition("\n")[0]


def on_this_node(host: str) -> str:
    """The address that a worker or the supervisor listens on here."""
    return str(ray.util.get_node_ip_address()) if host == "auto" else host


async def _result(reference: Any) -> Any:
    return await reference


def _describe_death(error: BaseException) -> str:
    """How an actor ended, and why where its code could not even be loaded."""
    absent = [line for line in str(error).splitlines() if "ModuleNotFoundError" in line]
    if absent:
        return f"{absent[-1].strip()}: is Baton installed on the node, as where baton serve runs?"
    return first_line(error)
