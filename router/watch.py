"""The Watch stream of one worker: its load, its free blocks, and the hashes of what it has cached.

Owned by a worker link; runs as one task on the router's event loop.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterable, Callable

import grpc.aio

from baton.internal.v1 import worker_pb2
from router.backoff import Backoff
from router.snapshot import PrefixView

_log = logging.getLogger(__name__)

OpenWatch = Callable[[worker_pb2.WatchRequest], AsyncIterable[worker_pb2.WorkerState]]


class WatchStream:
    """Follows a worker's state, with a new call (and so a new snapshot) after each break or gap.

    Args:
        open_watch: the stub's Watch method.
        on_change: called after every state and when the stream goes down.

    Attributes:
        state: the last one; None until the first and while the stream is down.
    """

    def __init__(
        self, open_watch: OpenWatch, router_id: str, worker: str, on_change: Callable[[], None], *, max_backoff_s: float
    ) -> None:
        self._open = open_watch
        self._router_id = router_id
        self._worker = worker
        self._on_change = on_change
        self._backoff = Backoff(max_backoff_s)
        self.state: worker_pb2.WorkerState | None = None
        self.cached = PrefixView()

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            try:
                await self._follow()
            except grpc.aio.AioRpcError as error:
                _log.debug("watch of %s broke: %s", self._worker, error.details())
            if self.state is not None:
                self.state = None
                self._on_change()
            await self._backoff.wait()

    async def _follow(self) -> None:
        """Reads one call to its end, or to a gap."""
        async for state in self._open(worker_pb2.WatchRequest(router_id=self._router_id)):
            if state.snapshot:
                self.cached = PrefixView.of_keys(state.stored)
            elif self.state is not None and state.sequence == self.state.sequence + 1:
                self.cached = self.cached.updated(state.stored, state.removed)
            else:
                _log.warning("watch of %s has a gap before %d; asking for a snapshot", self._worker, state.sequence)
                return
            self.state = state
            self._backoff.reset()
            self._on_change()
