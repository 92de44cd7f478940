"""Follows the supervisor's membership, keeps a link to each worker incarnation, and publishes snapshots.

Owned by the server; one task and the links' tasks, all on the router's event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import grpc.aio

from baton.internal.v1 import transfer_pb2, worker_pb2, worker_pb2_grpc
from router.backoff import Backoff
from router.snapshot import ClusterSnapshot, WorkerKey, WorkerView
from router.worker_link import DecodeLink, LinkOptions, PrefillLink, open_channel

_log = logging.getLogger(__name__)

_MAX_BACKOFF_S = 1.0

# Called with the new snapshot and the worker that changed; None where workers came or went.
Listener = Callable[[ClusterSnapshot, WorkerKey | None], None]


class Membership:
    """The workers of the cluster.

    Losing the supervisor changes nothing: the links stay as they are until it speaks again.

    Args:
        address: host:port of the Membership service.

    Attributes:
        snapshot: the current one; replaced, never changed.
    """

    def __init__(self, address: str, options: LinkOptions) -> None:
        self._options = options
        self._channel = open_channel(address, options.max_message_bytes)
        self._stub: worker_pb2_grpc.MembershipAsyncStub = worker_pb2_grpc.MembershipStub(self._channel)
        self._prefill: dict[WorkerKey, PrefillLink] = {}
        self._decode: dict[WorkerKey, DecodeLink] = {}
        self._views: dict[WorkerKey, WorkerView] = {}
        self._decode_infos: list[worker_pb2.WorkerInfo] = []
        self._listeners: list[Listener] = []
        self._closing: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None
        self._layout: asyncio.Future[transfer_pb2.LayoutFingerprint] = asyncio.get_running_loop().create_future()
        self.snapshot = ClusterSnapshot()

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._reconcile(worker_pb2.MembershipView())
        await asyncio.gather(*self._closing)
        await self._channel.close()

    def subscribe(self, listener: Listener) -> None:
        """Calls `listener` after each new snapshot."""
        self._listeners.append(listener)

    def prefill_link(self, key: WorkerKey) -> PrefillLink | None:
        """None where the incarnation is gone."""
        return self._prefill.get(key)

    def decode_link(self, key: WorkerKey) -> DecodeLink | None:
        """None where the incarnation is gone."""
        return self._decode.get(key)

    @property
    def decode_infos(self) -> list[worker_pb2.WorkerInfo]:
        """Of the decode workers that are members, or were when there last were any."""
        return self._decode_infos

    async def model_layout(self) -> transfer_pb2.LayoutFingerprint:
        """The fingerprint of the model's KV; waits for the first decode worker ever seen."""
        return await asyncio.shield(self._layout)

    async def _run(self) -> None:
        backoff = Backoff(_MAX_BACKOFF_S)
        while True:
            try:
                async for view in self._stub.WatchMembership(worker_pb2.WatchMembershipRequest()):
                    backoff.reset()
                    self._reconcile(view)
            except grpc.aio.AioRpcError as error:
                _log.info("membership stream broke: %s", error.details())
            await backoff.wait()

    def _reconcile(self, view: worker_pb2.MembershipView) -> None:
        """Opens links to new incarnations and closes those that are no longer members."""
        wanted = {WorkerKey(info.name, info.epoch): info for info in view.workers}
        for key in [*self._prefill, *self._decode]:
            if key not in wanted:
                self._close_link(key)
        for key, info in wanted.items():
            if key not in self._prefill and key not in self._decode:
                self._open_link(key, info)
        if self._decode:
            self._decode_infos = [link.info for link in self._decode.values()]
        self._publish()

    def _open_link(self, key: WorkerKey, info: worker_pb2.WorkerInfo) -> None:
        _log.info("%s (epoch %d) joined at %s", key.name, key.epoch, info.address)
        if info.role == "prefill":
            self._prefill[key] = PrefillLink(info, self._options, self._changed)
            self._views[key] = self._prefill[key].view
            return
        self._decode[key] = DecodeLink(info, self._options, self._changed)
        self._views[key] = self._decode[key].view
        if not self._layout.done():
            self._layout.set_result(info.layout)

    def _close_link(self, key: WorkerKey) -> None:
        _log.info("%s (epoch %d) left", key.name, key.epoch)
        link = self._prefill.pop(key, None) or self._decode.pop(key)
        del self._views[key]
        task = asyncio.create_task(link.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _changed(self, key: WorkerKey) -> None:
        link = self._prefill.get(key) or self._decode.get(key)
        if link is not None:
            self._views[key] = link.view
            self._publish(key)

    def _publish(self, key: WorkerKey | None = None) -> None:
        self.snapshot = ClusterSnapshot(
            version=self.snapshot.version + 1,
            prefill=tuple(self._views[key] for key in self._prefill),
            decode=tuple(self._views[key] for key in self._decode),
        )
        for listener in self._listeners:
            listener(self.snapshot, key)
