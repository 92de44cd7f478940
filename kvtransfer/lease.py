"""Renewable leases: whatever is held for a peer is held until its lease runs out.

A worker owns one table for the requests that routers must keep alive. Any thread may call. Times are those of the
worker's own clock; nothing is compared across machines.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from baton.requests import AttemptRef


class LeaseTable:
    """Leases of equal length on attempts.

    Args:
        lease_s: seconds from a grant or a renewal to expiry.
        clock: monotonic seconds.
    """

    def __init__(self, lease_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease_s = lease_s
        self._clock = clock
        self._lock = threading.Lock()
        # Equal lengths make insertion order the order of expiry: renewing moves a lease to the end.
        self._expiry_s: dict[AttemptRef, float] = {}

    def __len__(self) -> int:
        with self._lock:
            return len(self._expiry_s)

    def __contains__(self, ref: AttemptRef) -> bool:
        with self._lock:
            return ref in self._expiry_s

    def grant(self, ref: AttemptRef) -> None:
        """Starts a lease; granting again renews it."""
        with self._lock:
            self._restart(ref)

    def renew(self, refs: Iterable[AttemptRef]) -> list[AttemptRef]:
        """Restarts leases; returns the refs that have none.

        A lease that has run out but was not collected by `expired` yet is renewed: nothing was released in between.
        """
        unknown = []
        with self._lock:
            for ref in refs:
                if ref in self._expiry_s:
                    self._restart(ref)
                else:
                    unknown.append(ref)
        return unknown

    def release(self, ref: AttemptRef) -> None:
        """Ends a lease; idempotent."""
        with self._lock:
            self._expiry_s.pop(ref, None)

    def expired(self) -> list[AttemptRef]:
        """Removes and returns the leases that have run out, oldest first."""
        with self._lock:
            now_s = self._clock()
            ended = []
            for ref, expiry_s in self._expiry_s.items():
                if expiry_s > now_s:
                    break
                ended.append(ref)
            for ref in ended:
                del self._expiry_s[ref]
            return ended

    @property
    def next_expiry_s(self) -> float | None:
        """When the next lease runs out, on the table's clock; None without leases."""
        with self._lock:
            return next(iter(self._expiry_s.values()), None)

    def _restart(self, ref: AttemptRef) -> None:
        self._expiry_s.pop(ref, None)
        self._expiry_s[ref] = self._clock() + self._lease_s
