"""What to do on which failure: a pure table, read by the pipeline."""

from __future__ import annotations

import dataclasses
import enum

from baton.errors import BatonError, UnavailableError
from router.snapshot import WorkerKey


class FailureKind(enum.StrEnum):
    """How an attempt ended early; also the `reason` label of the retries metric."""

    # The decode worker has no room; nothing was changed.
    REFUSED = "refused"
    # The decode worker gave the blocks back; the continuation is recomputed.
    PREEMPTED = "preempted"
    # The Reserve call failed.
    RESERVE_FAILED = "reserve_failed"
    # The Prefill stream broke or ended with a status, or its lease was lost: the worker died, or the transfer failed.
    PREFILL_FAILED = "prefill_failed"
    # The decode worker is gone.
    DECODE_LOST = "decode_lost"
    # The decode worker lives and no longer knows the request.
    LEASE_LOST = "lease_lost"
    # The decode worker lives and says that the request failed.
    DECODE_FAILED = "decode_failed"


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
    """The end of an attempt: what happened, what a client would be told, and the worker to keep away from."""

    kind: FailureKind
    error: BatonError
    worker: WorkerKey | None = None


class Action(enum.Enum):
    # Back into the queue with the same attempt number; nothing happened.
    REQUEUE = enum.auto()
    # A new attempt that forces what was delivered.
    RETRY = enum.auto()
    FAIL = enum.auto()


# Failures after which a new attempt is made even though the decode worker had begun, since it lives and the client's
# tokens can be forced.
_RESUMABLE = frozenset({FailureKind.PREEMPTED, FailureKind.LEASE_LOST})
# Statuses of calls to workers that another attempt may not meet: the worker stops, is full, lost the transfer, or the
# reservation was over. The router's own cancellation never shows as a status.
_TRANSIENT = frozenset({"UNAVAILABLE", "RESOURCE_EXHAUSTED", "ABORTED", "CANCELLED", "FAILED_PRECONDITION"})
# Failures that no worker is to blame for, so that they do not use up retries.
_FREE = frozenset({FailureKind.REFUSED, FailureKind.PREEMPTED})


def decide(failure: Failure, *, committed: bool) -> Action:
    """What follows a failure.

    Args:
        committed: whether the decode worker had begun to decode. It lives on when its prefill worker fails.
    """
    if failure.kind is FailureKind.REFUSED:
        return Action.REQUEUE
    if failure.kind in _RESUMABLE:
        return Action.RETRY
    if failure.kind is FailureKind.DECODE_LOST:
        return Action.FAIL if committed else Action.RETRY
    if committed and failure.kind is not FailureKind.PREFILL_FAILED:
        return Action.FAIL
    return Action.RETRY if failure.error.status in _TRANSIENT else Action.FAIL


def counts_as_retry(failure: Failure) -> bool:
    """Whether a new attempt after this failure counts against `max_retries`."""
    return failure.kind not in _FREE


def exhausted(failure: Failure, max_retries: int) -> BatonError:
    """What the client is told when the last retry has failed."""
    return UnavailableError(f"gave up after {max_retries} retries; the last failure: {failure.error.message}")
