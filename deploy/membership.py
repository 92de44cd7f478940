"""The membership of a cluster, and the gRPC service that publishes it.

Owned by the supervisor and used on its event loop; the router and `baton serve` follow it with `follow_membership`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

import grpc
import grpc.aio

from baton.internal.v1 import worker_pb2, worker_pb2_grpc


class Membership(worker_pb2_grpc.MembershipServicer):
    """Who is in. Every watcher gets the full view at once and after each change; a slow one skips views."""

    def __init__(self) -> None:
        self._view = worker_pb2.MembershipView(version=1)
        self._changed = asyncio.Event()

    @property
    def view(self) -> worker_pb2.MembershipView:
        return self._view

    def join(self, worker: worker_pb2.WorkerInfo) -> None:
        """Adds a worker, in place of an earlier incarnation of the same name."""
        others = [member for member in self._view.workers if member.name != worker.name]
        self._publish(sorted([*others, worker], key=lambda member: member.name))

    def leave(self, worker: worker_pb2.WorkerInfo) -> None:
        """Removes an incarnation; without effect when it is not (any more) a member."""
        remaining = [member for member in self._view.workers if member.epoch != worker.epoch]
        if len(remaining) < len(self._view.workers):
            self._publish(remaining)

    def _publish(self, workers: list[worker_pb2.WorkerInfo]) -> None:
        self._view = worker_pb2.MembershipView(version=self._view.version + 1, workers=workers)
        self._changed.set()
        self._changed = asyncio.Event()

    async def WatchMembership(  # noqa: N802
        self, request: worker_pb2.WatchMembershipRequest, context: grpc.ServicerContext
    ) -> AsyncIterator[worker_pb2.MembershipView]:
        while True:
            view, changed = self._view, self._changed
            yield view
            await changed.wait()


class MembershipServer:
    """Serves a `Membership` on a port of its own."""

    def __init__(self, membership: Membership, host: str) -> None:
        self._membership = membership
        self._host = host
        self._server: grpc.aio.Server | None = None

    async def start(self) -> str:
        """Listens, and returns "host:port"."""
        self._server = grpc.aio.server()
        worker_pb2_grpc.add_MembershipServicer_to_server(self._membership, self._server)
        port = self._server.add_insecure_port(f"{self._host}:0")
        await self._server.start()
        return f"{self._host}:{port}"

    async def stop(self) -> None:
        """Ends every watch; idempotent."""
        if self._server is not None:
            await self._server.stop(grace=None)


async def follow_membership(address: str) -> AsyncGenerator[worker_pb2.MembershipView, None]:
    """The views of the service at `address`, until the connection fails.

    Raises:
        grpc.aio.AioRpcError: the supervisor is gone.
    """
    async with grpc.aio.insecure_channel(address) as channel:
        stub: worker_pb2_grpc.MembershipAsyncStub = worker_pb2_grpc.MembershipStub(channel)
        async for view in stub.WatchMembership(worker_pb2.WatchMembershipRequest()):
            yield view
