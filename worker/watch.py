"""The Watch stream: what routers need to know of a worker to place requests on it.

The engine thread reports load and the hashes that came and went; each watching router gets a snapshot and then
sequence-numbered deltas. A slow router gets fewer, merged messages, never an unbounded queue.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncGenerator, Sequence

from baton.internal.v1 import worker_pb2

_MAX_DELTA = 1024


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A worker's load between two steps; tokens and blocks."""

    running: int = 0
    waiting: int = 0
    free_blocks: int = 0
    total_blocks: int = 0
    queued_tokens: int = 0
    token_credit: int = 0
    draining: bool = False


class _Subscriber:
    """What one router has not been told yet. Guarded by the publisher's lock."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.changed = asyncio.Event()
        self.stored: set[bytes] = set()
        self.removed: set[bytes] = set()
        self.snapshot = True
        self._is_woken = False

    def wake(self) -> None:
        """There is something to tell. Waking another thread's loop costs a system call, so once is enough."""
        if not self._is_woken:
            self._is_woken = True
            self.loop.call_soon_threadsafe(self.changed.set)

    def rest(self) -> None:
        """All has been told."""
        self._is_woken = False
        self.changed.clear()


class WatchPublisher:
    """Fans a worker's state out to routers. `update` is called by the engine thread, `watch` by the event loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._keys: set[bytes] = set()
        self._load = Load()
        self._subscribers: set[_Subscriber] = set()

    def update(self, load: Load, stored: Sequence[bytes] = (), removed: Sequence[bytes] = ()) -> None:
        """Publish load and the block keys that became present and that went, if anything changed."""
        with self._lock:
            if load == self._load and not stored and not removed:
                return
            self._load = load
            self._keys.difference_update(removed)
            self._keys.update(stored)
            for subscriber in self._subscribers:
                subscriber.stored.difference_update(removed)
                subscriber.removed.update(removed)
                subscriber.stored.update(stored)
                subscriber.removed.difference_update(stored)
                if len(subscriber.removed) > max(len(self._keys), _MAX_DELTA):
                    # A stalled router: from here on a snapshot is less than the difference.
                    subscriber.snapshot = True
                    subscriber.stored.clear()
                    subscriber.removed.clear()
                subscriber.wake()

    async def watch(self) -> AsyncGenerator[worker_pb2.WorkerState, None]:
        """Messages for one router, until it goes."""
        subscriber = _Subscriber(asyncio.get_running_loop())
        subscriber.changed.set()
        with self._lock:
            self._subscribers.add(subscriber)
        sequence = 0
        try:
            while True:
                await subscriber.changed.wait()
                yield self._next_message(subscriber, sequence)
                sequence += 1
        finally:
            with self._lock:
                self._subscribers.discard(subscriber)

    def _next_message(self, subscriber: _Subscriber, sequence: int) -> worker_pb2.WorkerState:
        with self._lock:
            subscriber.rest()
            load = self._load
            message = worker_pb2.WorkerState(
                sequence=sequence,
                snapshot=subscriber.snapshot,
                stored=self._keys if subscriber.snapshot else subscriber.stored,
                removed=() if subscriber.snapshot else subscriber.removed,
                running=load.running,
                waiting=load.waiting,
                free_blocks=load.free_blocks,
                total_blocks=load.total_blocks,
                queued_tokens=load.queued_tokens,
                token_credit=load.token_credit,
                draining=load.draining,
            )
            subscriber.snapshot = False
            subscriber.stored = set()
            subscriber.removed = set()
            return message
