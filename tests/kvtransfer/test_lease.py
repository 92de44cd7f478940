from __future__ import annotations

import pytest

from kvtransfer.lease import LeaseTable
from tests.kvtransfer.sides import ref


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(clock: Clock) -> LeaseTable:
    return LeaseTable(15.0, clock)


def test_a_lease_runs_out_once(table: LeaseTable, clock: Clock) -> None:
    table.grant(ref("a"))
    clock.now_s += 14.9
    assert table.expired() == []
    clock.now_s += 0.1
    assert table.expired() == [ref("a")]
    assert table.expired() == []
    assert ref("a") not in table


def test_renewing_starts_the_lease_anew(table: LeaseTable, clock: Clock) -> None:
    for name in "abc":
        table.grant(ref(name))
        clock.now_s += 1
    assert table.renew([ref("a")]) == []
    assert table.next_expiry_s == 101 + 15
    clock.now_s = 117
    assert table.expired() == [ref("b"), ref("c")]
    assert table.next_expiry_s == 103 + 15
    clock.now_s = 118
    assert table.expired() == [ref("a")]
    assert table.next_expiry_s is None


def test_renewing_names_what_is_unknown(table: LeaseTable, clock: Clock) -> None:
    table.grant(ref("a"))
    table.grant(ref("b"))
    table.release(ref("b"))
    assert table.renew([ref("a"), ref("a", attempt=1), ref("b"), ref("c")]) == [ref("a", attempt=1), ref("b"), ref("c")]
    clock.now_s += 20
    assert table.expired() == [ref("a")]
    assert table.renew([ref("a")]) == [ref("a")]


def test_a_lease_can_be_renewed_until_its_expiry_is_collected(table: LeaseTable, clock: Clock) -> None:
    table.grant(ref("a"))
    clock.now_s += 20
    assert table.renew([ref("a")]) == []
    assert table.expired() == []


def test_release_is_idempotent(table: LeaseTable, clock: Clock) -> None:
    table.grant(ref("a"))
    table.release(ref("a"))
    table.release(ref("a"))
    clock.now_s += 20
    assert table.expired() == []
    assert len(table) == 0


def test_granting_again_renews(table: LeaseTable, clock: Clock) -> None:
    table.grant(ref("a"))
    clock.now_s += 10
    table.grant(ref("a"))
    assert len(table) == 1
    clock.now_s += 10
    assert table.expired() == []
