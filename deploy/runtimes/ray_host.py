"""The Ray cluster that `baton serve` uses: a local one of its own, or one that runs already."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from baton.config import Role, ServeConfig, supervisor_config
from deploy.environment import tracing_environment
from deploy.errors import StartError
from deploy.placement import Node, Placed, choose, describe_lack, make_request
from deploy.reaper import Reaper
from deploy.runtimes.ray import RaySupervisor, SupervisorActor, alive_nodes, first_line

OBJECT_STORE_BYTES = 80 << 20
PROBE_TIMEOUT_S = 5.0
LONGEST_FOLDER = 24
NODE_POLL_S = 0.5

_log = logging.getLogger(__name__)


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
        await self._await_nodes()

    def supervisor(self) -> RaySupervisor:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor_class = ray.remote(num_cpus=0, max_restarts=0, scheduling_strategy=here)(SupervisorActor)
        self._supervisor = actor_class.remote(supervisor_config(self._config).model_dump_json(), dict(self._actors))
        return RaySupervisor(self._supervisor)

    async def close(self) -> None:
        if self._initialising is None:
            return
        with contextlib.suppress(StartError):
            await self._initialising
        await asyncio.get_running_loop().run_in_executor(self._thread, self._shut_down)
        self._thread.shutdown()
        self._initialising = None

    async def _await_nodes(self) -> None:
        """Returns when a worker of each role has a node to go to; nodes may still be joining."""
        loop = asyncio.get_running_loop()
        wait_s = self._config.cluster.node_wait_s if self._address is not None else 0.0
        deadline = loop.time() + wait_s
        for attempt in itertools.count():
            nodes = await loop.run_in_executor(self._thread, alive_nodes)
            lacking = self._describe_lacking(nodes)
            if lacking is None:
                return
            if loop.time() >= deadline:
                raise StartError(lacking)
            if attempt == 0:
                _log.warning("waiting up to %g s: %s", wait_s, lacking)
            await asyncio.sleep(NODE_POLL_S)

    def _describe_lacking(self, nodes: Sequence[Node]) -> str | None:
        """Why workers of a role have no node to go to; None where all roles have one."""
        roles: tuple[Role, ...] = ("prefill", "decode")
        placed: list[Placed] = []
        for request in (make_request(self._config, role, nodes) for role in roles):
            node = choose(nodes, request, placed)
            if node is None:
                return describe_lack(request, nodes, placed)
            placed.append(Placed(node.id, request))
        return None

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
                # Ray forks its daemons from this process, in which it calls gRPC as well; with gRPC's handlers a child
                # dies now and then between fork and exec, and Ray waits for it in vain.
                os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
                # Workers are servers here. As Ray has it everything else on the host would go before them.
                os.environ.setdefault("RAY_worker_niceness", "0")
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
                # Nodes of a cluster that runs already do not have this process's environment.
                if variables := tracing_environment():
                    quiet["runtime_env"] = {"env_vars": variables}
                ray.init(address=self._address, **quiet)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            where = f"--ray-address {self._address}" if self._address else "Ray does not start"
            raise StartError(f"{where}: {_describe(error)}") from error

    def _shut_down(self) -> None:
        if self._supervisor is not None:
            # The workers' actors are the supervisor's and go with it.
            ray.kill(self._supervisor, no_restart=True)
        if self._reaper is not None:
            self._reaper.watch(_families(self._daemons))
        ray.shutdown()
        if self._reaper is not None:
            self._reaper.reap()


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
    is_node = any(process.info["name"] == "raylet" for process in psutil.process_iter(["name"]))
    if not address.startswith("ray://") and not is_node:
        raise ConnectionError(f"this host is no node of a Ray cluster; first run: ray start --address={address}")


def _describe(error: BaseException) -> str:
    """Why Ray could not be started or joined, and what to do about it where Ray does not say."""
    # In the text, or in that of what caused it.
    if any("AuthenticationError" in f"{type(cause)} {cause}" for cause in _causes(error)):
        return (
            "the cluster asks for another token: set RAY_AUTH_MODE=token, and put the token of its head into "
            "RAY_AUTH_TOKEN or ~/.ray/auth_token, here and on every node"
        )
    # Ray tells the versions of both sides in further lines.
    text = " ".join(str(error).split())
    return text if text.startswith("Version mismatch") else first_line(error)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
