"""A cluster whose router and workers share the test's process and speak over real sockets.

It starts in a second or two where processes take ten, so that families and transports can each be tried; what processes
add (death, signals, orphans) is tried elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import threading
from collections.abc import Coroutine, Iterator
from typing import Any, Literal, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.client import Client
from baton.config import (
    CacheConfig,
    DecodeConfig,
    ModelConfig,
    PrefillConfig,
    Role,
    RouterConfig,
    RouterProcessConfig,
    TransferConfig,
    WorkerConfig,
)
from baton.internal.v1 import worker_pb2
from decode_worker.actor import DecodeActor
from deploy.membership import Membership, MembershipServer
from prefill_worker.actor import PrefillActor
from router.server import RouterServer

T = TypeVar("T")
Transport = Literal["loopback", "shm", "grpc"]


class InProcessCluster:
    """One router, one prefill and one decode worker.

    Attributes:
        target: host:port of the router.
    """

    def __init__(
        self,
        model: pathlib.Path,
        *,
        transport: Transport = "shm",
        cache: CacheConfig | None = None,
        prefill: PrefillConfig | None = None,
        decode: DecodeConfig | None = None,
        router: RouterConfig | None = None,
    ) -> None:
        self._model = ModelConfig(path=str(model))
        self._cache = cache or CacheConfig(kv_cache_bytes=8 << 20)
        self._prefill = prefill or PrefillConfig(max_batch_tokens=64)
        self._decode = decode or DecodeConfig(local_prefill_tokens=0, backlog_prefill_tokens=0)
        self._router = router or RouterConfig(grpc_port=0, http_port=0)
        self._transfer = TransferConfig(transports=(transport,))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="router")
        self.actors: dict[str, PrefillActor | DecodeActor] = {}
        self.target = ""
        self.http = ""

    def start(self) -> None:
        self._thread.start()
        infos = [self._start_worker("prefill", 1), self._start_worker("decode", 2)]
        self._run(self._start_router(infos))
        with grpc.insecure_channel(self.target) as channel:
            for answer in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()):
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    break

    def stop(self) -> None:
        self._run(self._stop_router())
        for actor in self.actors.values():
            actor.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def break_attach(self) -> None:
        """Breaks the router's token stream to the decode worker, as a lost connection would."""
        (view,) = self._server.membership.snapshot.decode
        link = self._server.membership.decode_link(view.key)
        assert link is not None
        self._loop.call_soon_threadsafe(link.attach.reset)

    def _start_worker(self, role: Role, epoch: int) -> worker_pb2.WorkerInfo:
        config = WorkerConfig(
            role=role,
            name=f"{role}-0",
            epoch=epoch,
            model=self._model,
            cache=self._cache,
            prefill=self._prefill,
            decode=self._decode,
            transfer=self._transfer,
        )
        actor = (PrefillActor if role == "prefill" else DecodeActor)(config.model_dump_json())
        self.actors[config.name] = actor
        return worker_pb2.WorkerInfo.FromString(actor.start())

    async def _start_router(self, infos: list[worker_pb2.WorkerInfo]) -> None:
        membership = Membership()
        for info in infos:
            membership.join(info)
        self._members = MembershipServer(membership, "127.0.0.1")
        address = await self._members.start()
        self._server = RouterServer(
            RouterProcessConfig(
                model=self._model,
                router=self._router,
                decode=self._decode,
                transfer=self._transfer,
                membership_address=address,
            )
        )
        await self._server.start()
        self.target, self.http = self._server.grpc_address, f"http://{self._server.http_address}"

    async def _stop_router(self) -> None:
        await self._server.stop()
        await self._members.stop()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)


@contextlib.contextmanager
def in_process_cluster(model: pathlib.Path, **kwargs: Any) -> Iterator[Client]:
    """A client of a cluster in this process; at the end both pools must be empty."""
    cluster = InProcessCluster(model, **kwargs)
    cluster.start()
    try:
        with Client(cluster.target) as client:
            yield client
            assert_idle(client)
    finally:
        cluster.stop()


def assert_idle(client: Client, timeout_s: float = 10.0) -> None:
    """Every block of every pool is free. Releases may still be under way, so states are watched for a while."""
    deadline = threading.Event()
    timer = threading.Timer(timeout_s, deadline.set)
    timer.start()
    try:
        while not all(w.free_blocks == w.total_blocks and not w.running for w in client.status().workers):
            assert not deadline.is_set(), client.status()
    finally:
        timer.cancel()
