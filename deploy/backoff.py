"""How long to wait before a process that died is replaced."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class BackoffPolicy:
    """The first replacement is immediate; what dies again within `steady_s` waits `first_s`, then twice as long each
    time, up to `most_s`.
    """

    first_s: float = 0.5
    most_s: float = 4.0
    steady_s: float = 5.0


class Backoff:
    """The waits of one process; pure, so that it needs no clock."""

    def __init__(self, policy: BackoffPolicy) -> None:
        self._policy = policy
        self._failures = 0

    def delay_s(self, lived_s: float) -> float:
        """The wait after a death, given how long the process had lived; 0 for one that never came up."""
        if lived_s >= self._policy.steady_s:
            self._failures = 0
        self._failures += 1
        if self._failures == 1:
            return 0.0
        return float(min(self._policy.first_s * 2 ** (self._failures - 2), self._policy.most_s))
