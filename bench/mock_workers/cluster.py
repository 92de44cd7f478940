"""A cluster of mock workers, for tests and for measuring the router alone.

async with MockCluster(num_prefill=1, num_decode=2) as cluster:
    ...  # a router that follows cluster.membership.address
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable

import grpc.aio

from baton.internal.v1 import worker_pb2, worker_pb2_grpc
from bench.mock_workers.decode import MockDecode
from bench.mock_workers.prefill import MockPrefill
from bench.mock_workers.worker import Context, Names, Script, Worker


class MockMembership:
    """Publishes whatever view it is given."""

    def __init__(self) -> None:
        self._view = worker_pb2.MembershipView()
        self._changed = asyncio.Condition()
        self._server = grpc.aio.server()
        worker_pb2_grpc.add_MembershipServicer_to_server(self, self._server)  # type: ignore[arg-type]
        self._port = self._server.add_insecure_port("127.0.0.1:0")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    async def start(self) -> None:
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(None)

    async def publish(self, workers: Iterable[Worker]) -> None:
        async with self._changed:
            infos = [worker.info() for worker in workers]
            self._view = worker_pb2.MembershipView(version=self._view.version + 1, workers=infos)
            self._changed.notify_all()

    async def WatchMembership(  # noqa: N802
        self, request: worker_pb2.WatchMembershipRequest, context: Context
    ) -> AsyncIterator[worker_pb2.MembershipView]:
        sent = -1
        while True:
            async with self._changed:
                while self._view.version <= sent:
                    await self._changed.wait()
                view = self._view
            sent = view.version
            yield view


class MockCluster:
    """Prefill workers, decode workers, and a membership that names those alive.

    Args:
        total_blocks: of each worker's pool.
        reports_load: as of `MockDecode`.
    """

    def __init__(
        self,
        *,
        num_prefill: int = 1,
        num_decode: int = 1,
        script: Script | None = None,
        step_s: float = 0.0,
        total_blocks: int = 64,
        reports_load: bool = False,
    ) -> None:
        self.script: Script = script or (lambda choice, position: 40 + (choice + position) % 20)
        self.step_s = step_s
        self.membership = MockMembership()
        self._names = Names()
        self.prefill: list[MockPrefill] = []
        self.decode: list[MockDecode] = []
        self._started: list[Worker] = []
        self._wanted = (num_prefill, num_decode)
        self._total_blocks = total_blocks
        self._reports_load = reports_load

    async def __aenter__(self) -> MockCluster:
        await self.membership.start()
        for _ in range(self._wanted[0]):
            await self.add_prefill()
        for _ in range(self._wanted[1]):
            await self.add_decode()
        await self.publish()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await asyncio.gather(*(worker.stop() for worker in self._started), self.membership.stop())

    async def add_prefill(self, name: str = "") -> MockPrefill:
        worker = MockPrefill(
            name or f"prefill-{len(self.prefill)}",
            len(self._started) + 1,
            self._say,
            self._names,
            total_blocks=self._total_blocks,
        )
        self.prefill.append(worker)
        await self._start(worker)
        return worker

    async def add_decode(self, name: str = "") -> MockDecode:
        worker = MockDecode(
            name or f"decode-{len(self.decode)}",
            len(self._started) + 1,
            self._say,
            self._names,
            step_s=self.step_s,
            total_blocks=self._total_blocks,
            reports_load=self._reports_load,
        )
        self.decode.append(worker)
        await self._start(worker)
        return worker

    async def publish(self) -> None:
        await self.membership.publish([*self.prefill, *self.decode])

    async def remove(self, worker: Worker) -> None:
        """The supervisor has noticed that a worker is gone."""
        with contextlib.suppress(ValueError):
            self.prefill.remove(worker)  # type: ignore[arg-type]
        with contextlib.suppress(ValueError):
            self.decode.remove(worker)  # type: ignore[arg-type]
        await self.publish()

    def pace(self, step_s: float) -> None:
        """Changes the time between two steps of every decode worker."""
        self.step_s = step_s
        for worker in self.decode:
            worker.step_s = step_s

    async def _start(self, worker: Worker) -> None:
        self._started.append(worker)
        await worker.start()
        for prefill in self.prefill:
            prefill.peers = {decode.name: decode for decode in self.decode}

    def _say(self, choice: int, position: int) -> int:
        return self.script(choice, position)
