from __future__ import annotations

from router.page.roster import Roster
from router.snapshot import ClusterSnapshot, WorkerKey, WorkerView
from tests.router.jobs import Clock


def view(name: str, epoch: int) -> WorkerView:
    return WorkerView(key=WorkerKey(name, epoch), role=name.partition("-")[0], connected=True)


def test_a_replaced_worker_is_remembered_for_a_while() -> None:
    clock = Clock()
    roster = Roster(clock)
    roster.update(ClusterSnapshot(1, decode=(view("decode-0", 1),)), None)
    joined = clock.now
    clock.now += 5
    roster.update(ClusterSnapshot(2), None)
    left = clock.now
    clock.now += 5
    roster.update(ClusterSnapshot(3, decode=(view("decode-0", 2),)), None)
    assert [(departure.view.key, departure.at) for departure in roster.departed()] == [(WorkerKey("decode-0", 1), left)]
    assert roster.joined_at(WorkerKey("decode-0", 1)) is None
    assert roster.joined_at(WorkerKey("decode-0", 2)) == joined + 10
    clock.now += 120
    assert roster.departed() == []


def test_a_worker_that_only_changes_has_not_come() -> None:
    clock = Clock()
    roster = Roster(clock)
    roster.update(ClusterSnapshot(1, decode=(view("decode-0", 1),)), None)
    joined = clock.now
    clock.now += 5
    roster.update(ClusterSnapshot(2, decode=(view("decode-0", 1),)), WorkerKey("decode-0", 1))
    roster.update(ClusterSnapshot(3, decode=(view("decode-0", 1),)), None)
    assert roster.joined_at(WorkerKey("decode-0", 1)) == joined


def test_a_worker_that_dies_again_and_again_fills_no_memory() -> None:
    clock = Clock()
    roster = Roster(clock)
    for epoch in range(200):
        roster.update(ClusterSnapshot(epoch, decode=(view("decode-0", epoch),)), None)
    departed = roster.departed()
    assert len(departed) < 20
    assert departed[-1].view.key.epoch == 198
