"""Cancels that came too early: a Cancel may overtake the message that it is about."""

from __future__ import annotations

from collections.abc import Callable

from baton.requests import AttemptRef


class Tombstones:
    """Attempts that were cancelled before they were known, remembered for one lease.

    Only the engine thread calls it.
    """

    def __init__(self, lease_s: float, clock: Callable[[], float]) -> None:
        self._lease_s = lease_s
        self._clock = clock
        self._expiry: dict[AttemptRef, float] = {}

    def __len__(self) -> int:
        return len(self._expiry)

    def add(self, ref: AttemptRef) -> None:
        now = self._clock()
        # Insertion order is expiry order: drop the old from the front.
        for old in list(self._expiry):
            if self._expiry[old] > now:
                break
            del self._expiry[old]
        self._expiry[ref] = now + self._lease_s

    def take(self, ref: AttemptRef) -> bool:
        """Whether `ref` was cancelled within the last lease; forgets it."""
        expiry = self._expiry.pop(ref, None)
        return expiry is not None and expiry > self._clock()
