"""Workers that have gone and when workers came, kept for a while: what the page shows of a death and a replacement.

A listener of `Membership`, on the router's event loop.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence

from router.snapshot import ClusterSnapshot, WorkerKey, WorkerView

_SHOWN_S = 60.0
_MAX_DEPARTED = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Departure:
    """A worker as it was last seen, and when it left, in monotonic seconds."""

    view: WorkerView
    at: float


class Roster:
    """Who came and who left.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._members: dict[WorkerKey, WorkerView] = {}
        self._joined_at: dict[WorkerKey, float] = {}
        self._departed: collections.deque[Departure] = collections.deque(maxlen=_MAX_DEPARTED)

    def update(self, snapshot: ClusterSnapshot, key: WorkerKey | None) -> None:
        """A listener of `Membership`; looks only where workers came or went."""
        if key is not None:
            return
        now = self._clock()
        before, self._members = self._members, {view.key: view for view in (*snapshot.prefill, *snapshot.decode)}
        self._departed.extend(Departure(view, now) for key, view in before.items() if key not in self._members)
        self._joined_at = {key: self._joined_at.get(key, now) for key in self._members}

    def joined_at(self, key: WorkerKey) -> float | None:
        """When the router heard of a member."""
        return self._joined_at.get(key)

    def departed(self) -> Sequence[Departure]:
        """Those that left in the last minute, the last ones last."""
        return [departure for departure in self._departed if departure.at > self._clock() - _SHOWN_S]
