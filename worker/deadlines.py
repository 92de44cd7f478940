"""Which of a worker's requests have run out of time, without a look at each of them in every step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Generic, Protocol, TypeVar

from baton.requests import AttemptRef


class HasDeadline(Protocol):
    """A request whose client may wait only so long."""

    @property
    def deadline_s(self) -> float | None:
        """On the worker's clock; None for never."""


R = TypeVar("R", bound=HasDeadline)


class Deadlines(Generic[R]):
    """Only the engine thread calls it.

    Args:
        requests: the loop's, by reference.

    Attributes:
        next_s: no deadline to come is earlier; it may be that of a request that has ended since.
    """

    def __init__(self, requests: Mapping[AttemptRef, R]) -> None:
        self._requests = requests
        self.next_s = math.inf

    def add(self, request: R) -> None:
        """The request is among the loop's from now on."""
        if request.deadline_s is not None:
            self.next_s = min(self.next_s, request.deadline_s)

    def passed(self, now_s: float) -> list[R]:
        """Requests whose deadline has passed; one that the loop keeps nevertheless may be named again."""
        if now_s < self.next_s:
            return []
        limited = [(each.deadline_s, each) for each in self._requests.values() if each.deadline_s is not None]
        self.next_s = min((deadline_s for deadline_s, _ in limited if deadline_s > now_s), default=math.inf)
        return [request for deadline_s, request in limited if deadline_s <= now_s]

    def wait_s(self, now_s: float, expiry_s: float | None) -> float | None:
        """Seconds until the next deadline, or until `expiry_s` if that is earlier; None for never."""
        # Requests may have ended; those with an earlier deadline have been named.
        to_come = (each.deadline_s for each in self._requests.values() if each.deadline_s is not None)
        self.next_s = min((deadline_s for deadline_s in to_come if deadline_s >= self.next_s), default=math.inf)
        next_s = self.next_s if expiry_s is None else min(self.next_s, expiry_s)
        return None if next_s == math.inf else max(0.0, next_s - now_s)
