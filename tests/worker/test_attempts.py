"""Cancels that overtook what they cancel."""

from __future__ import annotations

from baton.requests import AttemptRef
from worker.attempts import Tombstones


def test_a_tombstone_works_once_and_for_one_lease() -> None:
    now = 0.0
    tombstones = Tombstones(10.0, lambda: now)
    first, second = AttemptRef("r", 1), AttemptRef("r", 2)
    tombstones.add(first)
    assert not tombstones.take(second)
    assert tombstones.take(first)
    assert not tombstones.take(first)
    tombstones.add(first)
    now = 10.0
    assert not tombstones.take(first)


def test_old_tombstones_do_not_pile_up() -> None:
    now = 0.0
    tombstones = Tombstones(1.0, lambda: now)
    for index in range(100):
        now = float(index * 2)
        tombstones.add(AttemptRef(str(index), 1))
    assert len(tombstones) == 1
