"""The queue of requests that wait for workers, by priority and then arrival.

A request leaves it when placement finds room: nothing is sent to a worker before. Waiters are looked at when something
has changed (a worker's state, an arrival, a placement that ended), never by a timer; the one timer here fails requests
that waited too long for any decode worker to come back. All on the router's event loop.
"""

from __future__ import annotations

import asyncio
import dataclasses
import heapq
import itertools
import time
from collections.abc import Callable

from baton.errors import OverloadedError, UnavailableError
from router.ledger import Charge, Ledger
from router.placement import Blocked, Demand, Placement, PlacementPolicy, place
from router.snapshot import ClusterSnapshot, WorkerKey


@dataclasses.dataclass(slots=True, eq=False)
class Entry:
    """One request's place in the queue; kept when it comes back, so that it comes back at its place.

    Attributes:
        granted_version: the snapshot that it was last placed by.
    """

    priority: int
    arrival: int
    demand: Demand
    granted_version: int = 0
    waiting_since: float = 0.0
    granted: asyncio.Future[Charge] | None = None

    def __lt__(self, other: Entry) -> bool:
        return (self.priority, self.arrival) < (other.priority, other.arrival)


class AdmissionQueue:
    """Decides when a request is placed, and asks `place` where.

    Args:
        ledger: charged with each placement that is granted; the holder of the charge releases it.
        max_queued: requests that may wait; retries and refusals come back whatever it says.
        worker_wait_s: longest wait while no decode worker is there.
        on_length: told how many requests wait, after each change.
    """

    def __init__(
        self,
        ledger: Ledger,
        policy: PlacementPolicy,
        *,
        max_queued: int,
        worker_wait_s: float,
        on_length: Callable[[int], None],
    ) -> None:
        self._ledger = ledger
        self._policy = policy
        self._max_queued = max_queued
        self._worker_wait_s = worker_wait_s
        self._on_length = on_length
        self._arrivals = itertools.count()
        self._heap: list[Entry] = []
        self._snapshot = ClusterSnapshot()
        self._lost_workers_at = 0.0
        self._wait_timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._heap)

    def enter(self, demand: Demand, priority: int) -> Entry:
        """A new request's entry; OverloadedError where the queue is full."""
        if len(self._heap) >= self._max_queued:
            raise OverloadedError(f"{len(self._heap)} requests are queued, the most that may be; try again later")
        return Entry(priority, next(self._arrivals), demand)

    async def admit(self, entry: Entry) -> Charge:
        """Waits for the entry's turn and for room; the charge names the placement."""
        loop = asyncio.get_running_loop()
        entry.granted, entry.waiting_since = loop.create_future(), time.monotonic()
        heapq.heappush(self._heap, entry)
        self._changed()
        try:
            return await entry.granted
        except BaseException:
            if entry.granted.done() and not entry.granted.cancelled() and entry.granted.exception() is None:
                # Cancelled after the grant and before it was seen.
                self.release(entry.granted.result())
            self._remove(entry)
            raise

    def put_back(self, entry: Entry, demand: Demand, *, avoid: WorkerKey | None) -> None:
        """Prepares an entry to be admitted again, away from workers that failed it.

        They are avoided for as long as another can take it, and else until there is a newer state than the one that
        they were chosen by, or none to come.
        """
        avoided = entry.demand.avoid if avoid is None else entry.demand.avoid | {avoid}
        entry.demand = dataclasses.replace(demand, avoid=avoided)

    def update(self, snapshot: ClusterSnapshot, key: WorkerKey | None) -> None:
        """A listener of `Membership`: the cluster has changed."""
        had, has = self._snapshot.has_decode_worker, snapshot.has_decode_worker
        self._snapshot = snapshot
        if had and not has:
            self._lost_workers_at = time.monotonic()
        if key is not None:
            self._ledger.state_arrived(key)
        self._changed()

    def reserved(self, charge: Charge) -> None:
        """The decode worker has granted a placement."""
        self._ledger.reserved(charge)

    def release(self, charge: Charge) -> None:
        """A placement is over; what it held may let another in."""
        self._ledger.release(charge)
        self._changed()

    def prefilled(self, charge: Charge) -> None:
        """A placement's prompt is computed, which gives its credit back."""
        self._ledger.prefilled(charge)
        self._changed()

    def close(self) -> None:
        """Fails all that wait."""
        for entry in list(self._heap):
            self._fail(entry, UnavailableError("the router is shutting down"))
        self._changed()

    def _changed(self) -> None:
        """Grants from the head for as long as there is room. Nobody overtakes the head, so that nobody starves."""
        while self._heap:
            head = self._heap[0]
            placement = self._place(head)
            if isinstance(placement, Blocked):
                break
            heapq.heappop(self._heap)
            assert head.granted is not None
            if not head.granted.done():
                head.granted_version = self._snapshot.version
                head.granted.set_result(self._ledger.charge(placement))
        self._watch_waiting_time()
        self._on_length(len(self._heap))

    def _place(self, entry: Entry) -> Placement | Blocked:
        placement = place(self._snapshot, self._ledger.pending, entry.demand, self._policy)
        if isinstance(placement, Placement) or not entry.demand.avoid or self._may_change(entry):
            return placement
        entry.demand = dataclasses.replace(entry.demand, avoid=frozenset())
        return place(self._snapshot, self._ledger.pending, entry.demand, self._policy)

    def _may_change(self, entry: Entry) -> bool:
        """Whether a worker that failed the entry has yet to send a state; where nothing runs, none will come."""
        is_idle = self._snapshot.idle and not self._ledger.pending
        return self._snapshot.version <= entry.granted_version and not is_idle

    def _remove(self, entry: Entry) -> None:
        if entry in self._heap:
            self._heap.remove(entry)
            heapq.heapify(self._heap)
            self._changed()

    def _fail(self, entry: Entry, error: Exception) -> None:
        if entry.granted is not None and not entry.granted.done():
            entry.granted.set_exception(error)

    def _watch_waiting_time(self) -> None:
        """Arms the timer while requests wait and no decode worker is there."""
        if self._heap and not self._snapshot.has_decode_worker:
            if self._wait_timer is None:
                self._wait_timer = asyncio.get_running_loop().call_at(
                    min(map(self._waits_until, self._heap)), self._end_waiting
                )
        elif self._wait_timer is not None:
            self._wait_timer.cancel()
            self._wait_timer = None

    def _waits_until(self, entry: Entry) -> float:
        return max(entry.waiting_since, self._lost_workers_at) + self._worker_wait_s

    def _end_waiting(self) -> None:
        self._wait_timer = None
        now = time.monotonic()
        for entry in list(self._heap):
            if self._waits_until(entry) <= now:
                self._fail(entry, UnavailableError(f"no decode worker for {self._worker_wait_s:g} s"))
                self._heap.remove(entry)
        heapq.heapify(self._heap)
        self._changed()
