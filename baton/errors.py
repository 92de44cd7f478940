"""Everything that can go wrong at run time, with the status that a client sees.

Nothing else reaches the wire. A status is held by its gRPC *name*, so that packages without grpc (the engine) can raise
these; `baton.wire` and the services turn names into codes at one seam each.
"""

from __future__ import annotations

from typing import ClassVar


class BatonError(Exception):
    """Base of all run-time errors.

    Attributes:
        status: name of the gRPC status code.
        http_status: status of the HTTP API.
        retryable: whether the same request may succeed if sent again.
    """

    status: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InternalError(BatonError):
    """A fault of Baton itself."""


class InvalidRequestError(BatonError):
    """The request can never succeed; the message names the field and the limit."""

    status = "INVALID_ARGUMENT"
    http_status = 400

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class UnauthenticatedError(BatonError):
    """The call carries no valid API key."""

    status = "UNAUTHENTICATED"
    http_status = 401


class ModelNotFoundError(BatonError):
    """The request names a model that is not served."""

    status = "NOT_FOUND"
    http_status = 404


class DuplicateRequestError(BatonError):
    """A request with the same id is running."""

    status = "ALREADY_EXISTS"
    http_status = 409


class OverloadedError(BatonError):
    """The queue is full; try again later."""

    status = "RESOURCE_EXHAUSTED"
    http_status = 429
    retryable = True


class UnavailableError(BatonError):
    """No worker can serve now, or the one that did has died."""

    status = "UNAVAILABLE"
    http_status = 503
    retryable = True


class DeadlineError(BatonError):
    """The client's deadline passed."""

    status = "DEADLINE_EXCEEDED"
    http_status = 504


class CancelledRequestError(BatonError):
    """The client cancelled or vanished."""

    status = "CANCELLED"
    http_status = 499


class LayoutMismatchError(BatonError):
    """Two KV pools cannot exchange blocks; the message names each difference."""

    status = "FAILED_PRECONDITION"
    http_status = 500


class TransferError(BatonError):
    """KV blocks did not arrive whole; the request may be tried again under a new attempt."""

    status = "ABORTED"
    http_status = 503
    retryable = True


class StaleAttemptError(BatonError):
    """A message of an attempt, reservation or epoch that is over."""

    status = "FAILED_PRECONDITION"
    http_status = 500


_BY_STATUS: dict[str, type[BatonError]] = {
    "UNAUTHENTICATED": UnauthenticatedError,
    "NOT_FOUND": ModelNotFoundError,
    "ALREADY_EXISTS": DuplicateRequestError,
    "RESOURCE_EXHAUSTED": OverloadedError,
    "UNAVAILABLE": UnavailableError,
    "DEADLINE_EXCEEDED": DeadlineError,
    "CANCELLED": CancelledRequestError,
    "FAILED_PRECONDITION": StaleAttemptError,
    "ABORTED": TransferError,
}


def from_status(status: str, message: str) -> BatonError:
    """The error that a peer meant by a status name and a message, for passing it on."""
    if status == "INVALID_ARGUMENT":
        field, separator, problem = message.partition(": ")
        return InvalidRequestError(field, problem) if separator else InvalidRequestError("request", message)
    return _BY_STATUS.get(status, InternalError)(message)
