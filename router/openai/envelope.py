"""What every answer says around its choices: id, time, model and usage; made once for each request."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from json.encoder import encode_basestring_ascii
from typing import Any

from baton.v1 import inference_pb2

_FINISH_REASONS: Mapping[int, str] = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
}

Json = dict[str, Any]


class Envelope:
    """Writes answers and events of one request.

    All JSON is ASCII, so that a client may cut a stream anywhere and still decode each piece by itself.

    Args:
        answer_id: as `cmpl-...`.
        object_name: of a whole answer; an event's may differ.
    """

    def __init__(
        self, answer_id: str, *, object_name: str, event_name: str, model: str, fingerprint: str, include_usage: bool
    ) -> None:
        self._head: Json = {
            "id": answer_id,
            "object": object_name,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        event_head = json.dumps({**self._head, "object": event_name})
        self._before = f"data: {event_head[:-1]}, ".encode()
        # Where usage is asked for, the events before it say so too.
        self._after = b', "usage": null}\n\n' if include_usage else b"}\n\n"

    def answer(self, choices: Sequence[Json], usage: Json, **extra: Any) -> bytes:
        """The whole answer."""
        return json.dumps({**self._head, "choices": choices, "usage": usage, **extra}).encode()

    def answer_of(self, choices: Sequence[bytes], usage: Json) -> bytes:
        """The whole answer, of choices that are JSON already."""
        before, after = json.dumps(self._head)[:-1], json.dumps(usage)
        return b"".join((f'{before}, "choices": ['.encode(), b", ".join(choices), f'], "usage": {after}}}'.encode()))

    def event_frame(self, before: str, after: str) -> tuple[bytes, bytes]:
        """What stands before and after the part that differs between the events of a choice.

        Args:
            before, after: the JSON of the choice around that part.
        """
        return self._before + f'"choices": [{before}'.encode(), f"{after}]".encode() + self._after

    def event(self, choices: Sequence[Json], usage: Json | None = None, **extra: Any) -> bytes:
        """Any event, extra fields beside its choices included."""
        rest = json.dumps({"choices": choices, **extra})[1:-1].encode()
        if usage is None:
            return self._before + rest + self._after
        return self._before + rest + f', "usage": {json.dumps(usage)}}}\n\n'.encode()


class UsageTotal:
    """Usage over all prompts of a request."""

    def __init__(self) -> None:
        self._prompt_tokens = self._cached_tokens = self._completion_tokens = 0

    def add(self, usage: inference_pb2.Usage) -> None:
        """The usage of one prompt's answers."""
        self._prompt_tokens += usage.prompt_tokens
        self._cached_tokens += usage.cached_tokens
        self._completion_tokens += usage.completion_tokens

    def json(self) -> Json:
        """As OpenAI writes it."""
        return {
            **usage_json(self._prompt_tokens, self._completion_tokens),
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }


def json_string(text: str) -> bytes:
    """A text as JSON, as `json.dumps` writes it: it is called for every token."""
    return encode_basestring_ascii(text).encode()


def usage_json(prompt_tokens: int, completion_tokens: int) -> Json:
    """Usage so far."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def finish_reason(delta: inference_pb2.ChoiceDelta) -> str | None:
    """OpenAI's name for it; None while the choice goes on."""
    return _FINISH_REASONS.get(delta.finish_reason)


def stop_reason(delta: inference_pb2.ChoiceDelta, stop_token_ids: Sequence[int]) -> str | int | None:
    """vLLM's `stop_reason`: the stop string, or the one of these tokens, that ended the choice."""
    match delta.WhichOneof("matched_stop"):
        case "stop_text":
            return delta.stop_text
        case "stop_token_id" if delta.stop_token_id in stop_token_ids:
            return delta.stop_token_id
    return None
