"""Deadlines: told when they have passed, and nothing is looked at before one is due."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from baton.requests import AttemptRef
from worker.deadlines import Deadlines


@dataclasses.dataclass
class Request:
    deadline_s: float | None


class CountedRequests(dict[AttemptRef, Request]):
    """Counts how often all of them are looked at."""

    num_scans = 0

    def values(self) -> Iterator[Request]:  # type: ignore[override]
        self.num_scans += 1
        return iter(super().values())


def deadlines_of(*times: float | None) -> tuple[Deadlines[Request], CountedRequests]:
    requests = CountedRequests()
    deadlines = Deadlines(requests)
    for index, deadline_s in enumerate(times):
        request = requests[AttemptRef(str(index), 1)] = Request(deadline_s)
        deadlines.add(request)
    return deadlines, requests


def test_each_is_told_when_it_has_passed() -> None:
    deadlines, requests = deadlines_of(5.0, None, 3.0, 5.0)
    assert deadlines.passed(2.9) == []
    assert deadlines.passed(3.0) == [Request(3.0)]
    del requests[AttemptRef("2", 1)]
    assert deadlines.passed(4.0) == []
    del requests[AttemptRef("0", 1)]
    assert deadlines.passed(9.0) == [Request(5.0)]
    assert deadlines.passed(99.0) == []


def test_nothing_is_looked_at_before_a_deadline() -> None:
    deadlines, requests = deadlines_of(5.0, 7.0)
    for now_s in range(5):
        deadlines.passed(float(now_s))
    assert requests.num_scans == 0


def test_a_worker_sleeps_until_the_next_deadline_or_the_end_of_a_lease() -> None:
    deadlines, _ = deadlines_of(5.0, 7.0)
    assert deadlines.wait_s(1.0, None) == 4.0
    assert deadlines.wait_s(1.0, 3.0) == 2.0
    assert deadlines.wait_s(9.0, None) == 0.0
    assert deadlines_of(None)[0].wait_s(1.0, None) is None
