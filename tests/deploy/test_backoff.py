"""When a process that died is replaced."""

from __future__ import annotations

from deploy.backoff import Backoff, BackoffPolicy

POLICY = BackoffPolicy(first_s=0.5, most_s=4.0, steady_s=5.0)


def test_the_first_replacement_is_immediate_and_the_waits_double_up_to_the_most() -> None:
    backoff = Backoff(POLICY)
    assert [backoff.delay_s(lived_s=1) for _ in range(7)] == [0, 0.5, 1, 2, 4, 4, 4]


def test_a_steady_life_forgives_what_was_before() -> None:
    backoff = Backoff(POLICY)
    for _ in range(5):
        backoff.delay_s(lived_s=0)
    assert [backoff.delay_s(lived_s=5), backoff.delay_s(lived_s=4.9)] == [0, 0.5]
