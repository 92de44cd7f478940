"""Reads the body of a request: bounded, JSON, and of the shape that its model describes."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, TypeVar

import pydantic
from pydantic_core import from_json
from starlette.requests import Request

from router.openai.errors import ApiError, as_validation_error

_Model = TypeVar("_Model", bound=pydantic.BaseModel)


async def read_model(request: Request, model: type[_Model], max_bytes: int) -> _Model:
    """The request's body.

    Raises:
        ApiError: it is too large, no JSON, or not what the model accepts.
        starlette.requests.ClientDisconnect: the client went before it was whole.
    """
    return as_model(await read_object(request, max_bytes), model)


async def read_object(request: Request, max_bytes: int) -> dict[str, Any]:
    """The request's body, where its model depends on what it holds; raises as `read_model` does."""
    body = await _read(request, max_bytes)
    try:
        parsed = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        problem = f"the body is not valid JSON: {error}"
        raise ApiError(HTTPStatus.BAD_REQUEST, problem, None, "invalid_json") from None
    if not isinstance(parsed, dict):
        raise ApiError(HTTPStatus.BAD_REQUEST, "the body must be a JSON object", None, "invalid_json")
    return parsed


def as_model(parsed: dict[str, Any], model: type[_Model]) -> _Model:
    """The body as the model has it; ApiError where it does not accept it."""
    try:
        return model.model_validate(parsed)
    except pydantic.ValidationError as error:
        raise as_validation_error(error) from None


async def _read(request: Request, max_bytes: int) -> bytes:
    _check_content_type(request.headers.get("content-type", ""))
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(body)


def _check_content_type(value: str) -> None:
    """Only JSON, which also keeps other sites' pages from sending requests through a user's browser."""
    media_type = value.partition(";")[0].strip().lower()
    if media_type != "application/json":
        problem = f"content-type: must be application/json, got {media_type[:100]!r}"
        raise ApiError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, problem)


def _too_large(max_bytes: int) -> ApiError:
    # The rest of the body is not read, so the connection cannot be used again.
    problem = f"the body has more than {max_bytes} bytes"
    return ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, problem, headers={"connection": "close"})
