from __future__ import annotations

import pytest

from baton.errors import (
    BatonError,
    CancelledRequestError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    StaleAttemptError,
    TransferError,
    UnavailableError,
)
from router.recovery import Action, Failure, FailureKind, counts_as_retry, decide, exhausted

GONE = UnavailableError("gone")


@pytest.mark.parametrize(
    ("kind", "error", "committed", "expected"),
    [
        (FailureKind.REFUSED, GONE, False, Action.REQUEUE),
        (FailureKind.PREEMPTED, GONE, True, Action.RETRY),
        (FailureKind.LEASE_LOST, StaleAttemptError("unknown"), True, Action.RETRY),
        (FailureKind.RESERVE_FAILED, GONE, False, Action.RETRY),
        (FailureKind.RESERVE_FAILED, InvalidRequestError("prompt", "too long"), False, Action.FAIL),
        (FailureKind.PREFILL_FAILED, GONE, False, Action.RETRY),
        (FailureKind.PREFILL_FAILED, TransferError("checksum"), False, Action.RETRY),
        (FailureKind.PREFILL_FAILED, OverloadedError("full"), False, Action.RETRY),
        (FailureKind.PREFILL_FAILED, CancelledRequestError("server stops"), False, Action.RETRY),
        (FailureKind.PREFILL_FAILED, InternalError("bug"), False, Action.FAIL),
        (FailureKind.PREFILL_FAILED, GONE, True, Action.RETRY),
        (FailureKind.PREFILL_FAILED, InternalError("bug"), True, Action.FAIL),
        (FailureKind.DECODE_LOST, GONE, False, Action.RETRY),
        (FailureKind.DECODE_LOST, GONE, True, Action.FAIL),
        (FailureKind.DECODE_FAILED, TransferError("checksum"), False, Action.RETRY),
        (FailureKind.DECODE_FAILED, GONE, True, Action.FAIL),
    ],
)
def test_the_table(kind: FailureKind, error: BatonError, committed: bool, expected: Action) -> None:
    assert decide(Failure(kind, error), committed=committed) is expected


def test_refusals_and_preemptions_use_up_no_retries() -> None:
    free = {kind for kind in FailureKind if not counts_as_retry(Failure(kind, GONE))}
    assert free == {FailureKind.REFUSED, FailureKind.PREEMPTED}


def test_giving_up_names_the_last_failure() -> None:
    error = exhausted(Failure(FailureKind.PREFILL_FAILED, GONE), max_retries=3)
    assert error.status == "UNAVAILABLE"
    assert error.message == "gave up after 3 retries; the last failure: gone"
