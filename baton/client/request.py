"""What a caller may ask of `generate`, and its wire message. Both clients build their requests here."""

from __future__ import annotations

import json
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

    At most one of these guides the text: `json_schema` (a schema, or its JSON), `json_object` (any JSON object),
    `regex`, `choice` (one of these texts) and `grammar` (in llguidance's dialect of Lark).
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
    prompt_logprobs: int | None
    json_schema: Mapping[str, Any] | str | None
    json_object: bool | None
    regex: str | None
    choice: Sequence[str] | None
    grammar: str | None
    include_stop: bool | None
    skip_special_tokens: bool | None
    model: str | None
    priority: int | None
    cache_salt: str | None
    request_id: str | None
    timeout_s: float | None


_REQUEST_FIELDS = ("model", "priority", "cache_salt", "request_id")
# Options and the fields of baton.v1.Grammar that they set.
_GRAMMARS = {
    "json_schema": "json_schema",
    "json_object": "json_object",
    "regex": "regex",
    "choice": "choice",
    "grammar": "lark",
}


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
    guides = {name: given.pop(name) for name in _GRAMMARS if name in given}
    if len(guides) > 1:
        raise InvalidRequestError("sampling.grammar", f"at most one can guide the text, got {' and '.join(guides)}")
    for name, value in guides.items():
        _set_grammar(request.sampling, name, value)
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


def _set_grammar(sampling: inference_pb2.SamplingParams, option: str, value: Any) -> None:
    kind = _GRAMMARS[option]
    if option == "json_schema" and isinstance(value, Mapping):
        try:
            value = json.dumps(value)
        except (TypeError, ValueError) as error:
            raise InvalidRequestError("sampling.grammar.json_schema", f"is not JSON: {error}") from error
    if option == "choice":
        sampling.grammar.choice.SetInParent()
        _merge(sampling.grammar.choice, inference_pb2.Alternatives, "texts", "sampling.grammar.choice", value)
    else:
        _merge(sampling.grammar, inference_pb2.Grammar, kind, f"sampling.grammar.{kind}", value)


def _merge(target: Message, kind: type[Message], name: str, field: str, value: Any) -> None:
    """Sets one field of `target`, a message of type `kind`; `field` is what an error calls it."""
    try:
        target.MergeFrom(kind(**{name: value}))
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(field, f"cannot be {value!r:.80}: {error}") from error
