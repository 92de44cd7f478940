"""What a caller may ask of `generate`, and its wire message. Both clients build their requests here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack

from google.protobuf.message import Message

from baton.errors import InvalidRequestError
from baton.v1 import inference_pb2

Prompt = str | Sequence[int]


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of `generate` and `stream`; what is left out or None takes the server's default.

    Names, ranges and defaults are those of `SamplingParams` in proto/baton/v1/inference.proto. Beside them:
    `model` (served model's name), `priority` (lower runs sooner), `cache_salt` (requests share cached prefixes only
    within a salt), `request_id` (unique among running requests) and `timeout_s` (the whole call's deadline).
    """

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    seed: int | None
    n: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    min_tokens: int | None
    logit_bias: Mapping[int, float] | None
    logprobs: int | None
    echo: bool | None
    model: str | None
    priority: int | None
    cache_salt: str | None
    request_id: str | None
    timeout_s: float | None


_REQUEST_FIELDS = ("model", "priority", "cache_salt", "request_id")


def build_request(prompt: Prompt, **options: Unpack[GenerateOptions]) -> inference_pb2.GenerateRequest:
    """The wire message of a call; `timeout_s` is the call's and does not appear in it.

    Raises:
        TypeError: an option that does not exist.
        InvalidRequestError: a value that its field cannot hold (of another type, a negative token id, lone surrogates).
    """
    if unknown := sorted(set(options) - set(GenerateOptions.__annotations__)):
        raise TypeError(f"unknown generate options: {', '.join(unknown)}")
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    given.pop("timeout_s", None)
    if isinstance(stop := given.get("stop"), str):
        given["stop"] = [stop]
    request = inference_pb2.GenerateRequest(sampling=inference_pb2.SamplingParams())
    for name, value in given.items():
        if name in _REQUEST_FIELDS:
            _merge(request, inference_pb2.GenerateRequest, name, name, value)
        else:
            _merge(request.sampling, inference_pb2.SamplingParams, name, f"sampling.{name}", value)
    if isinstance(prompt, str):
        _merge(request, inference_pb2.GenerateRequest, "text", "prompt", prompt)
    else:
        request.token_ids.SetInParent()
        _merge(request.token_ids, inference_pb2.TokenIds, "ids", "token_ids", prompt)
    return request


def _merge(target: Message, kind: type[Message], name: str, field: str, value: Any) -> None:
    """Sets one field of `target`, a message of type `kind`; `field` is what an error calls it."""
    try:
        target.MergeFrom(kind(**{name: value}))
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(field, f"cannot be {value!r:.80}: {error}") from error
