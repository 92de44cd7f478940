"""What clients are told when something goes wrong, in OpenAI's shape: {"error": {message, type, param, code}}.

The only place where Baton's errors become HTTP answers.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import pydantic
from starlette.responses import Response

from baton.errors import BatonError, InvalidRequestError, ModelNotFoundError, UnauthenticatedError

_log = logging.getLogger(__name__)

_INVALID = "invalid_request_error"
# OpenAI's types, and vLLM's where OpenAI has none, by status.
_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    409: "conflict_error",
    429: "rate_limit_error",
    500: "server_error",
    501: "not_implemented_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
_CODES: Mapping[int, str] = {
    404: "not_found",
    405: "method_not_allowed",
    409: "request_id_in_use",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "queue_full",
    499: "cancelled",
    500: "internal_error",
    501: "not_implemented",
    503: "unavailable",
    504: "deadline_exceeded",
}
# A client that waits this long finds a queue that has moved on.
_RETRY_AFTER_S = "1"
_MAX_VALUE_CHARS = 100
_MAX_INT_BITS = 256
# What pydantic's sentences begin with.
_SUBJECT = re.compile(r"^(Input|String|List|Dictionary) should")


class ApiError(Exception):
    """An answer that is an error.

    Args:
        param: path of the field that is wrong, as `messages[0].content`.
        code: for programs to tell errors apart; by default what belongs to the status.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = int(status)
        self.message = message
        self.param = param
        self.code = code or _CODES.get(self.status)
        self.headers = headers or {}

    def body(self) -> bytes:
        """The error as JSON, all ASCII."""
        error = {
            "message": self.message,
            "type": _TYPES.get(self.status, _INVALID),
            "param": self.param,
            "code": self.code,
        }
        return json.dumps({"error": error}).encode()

    def response(self) -> Response:
        """The answer of a request that has none yet."""
        headers = dict(self.headers)
        if self.status in (429, 503):
            headers.setdefault("retry-after", _RETRY_AFTER_S)
        return Response(self.body(), self.status, headers, media_type="application/json")


def refused(param: str, problem: str, code: str = "invalid_value") -> ApiError:
    """What is wrong with one field."""
    return ApiError(HTTPStatus.BAD_REQUEST, f"{param}: {problem}", param, code)


def as_api_error(error: Exception, names: Mapping[str, str] | None = None) -> ApiError:
    """What the client is told of any exception; unexpected ones are logged here.

    Args:
        names: what the client calls a field, by the name that the pipeline gives it, where they differ.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidRequestError):
        return _invalid_request(error, names or {})
    if isinstance(error, ModelNotFoundError):
        return ApiError(error.http_status, error.message, "model", "model_not_found")
    if isinstance(error, UnauthenticatedError):
        headers = {"www-authenticate": "Bearer"}
        return ApiError(error.http_status, error.message, None, "invalid_api_key", headers=headers)
    if isinstance(error, BatonError):
        return ApiError(error.http_status, error.message)
    _log.error("unexpected error", exc_info=error)
    return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error; see the router's log")


def as_validation_error(error: pydantic.ValidationError) -> ApiError:
    """The first thing that a request's model does not accept; its lists stop at their first: `output_format.MANY`."""
    first = error.errors(include_url=False, include_context=False)[0]
    param = _path(first["loc"])
    problem = _MESSAGES.get(first["type"]) or _SUBJECT.sub("must", first["msg"])
    if first["type"] == "missing":
        return refused(param, problem, "missing_required_parameter")
    is_type = first["type"].endswith("_type") or first["type"] in ("int_from_float", "finite_number")
    return refused(param, f"{problem}, got {shown(first['input'])}", "invalid_type" if is_type else "invalid_value")


_MESSAGES: Mapping[str, str] = {
    "missing": "is required",
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
}


def shown(value: Any) -> str:
    """A value of a request as errors quote it: bounded, and made in no time however large the value is."""
    match value:
        case str():
            whole = len(value) <= _MAX_VALUE_CHARS
            return json.dumps(value) if whole else json.dumps(value[:_MAX_VALUE_CHARS]) + "..."
        case list():
            return "a list"
        case dict():
            return "an object"
        case int() if value.bit_length() > _MAX_INT_BITS:
            return "a huge integer"
    return json.dumps(value, default=lambda other: type(other).__name__)


def _path(loc: Sequence[int | str]) -> str:
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path or "body"


def _invalid_request(error: InvalidRequestError, names: Mapping[str, str]) -> ApiError:
    field = error.field.removeprefix("sampling.")
    problem = error.message.removeprefix(f"{error.field}: ")
    param = names.get(field, field)
    # What agents look for, to shorten a conversation and try again.
    too_long = field in ("prompt", "max_tokens") and "max_model_len" in problem
    return refused(param, problem, "context_length_exceeded" if too_long else "invalid_value")
