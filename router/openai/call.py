"""What a call's headers say: who asks, under which id, and for how long."""

from __future__ import annotations

import dataclasses
import math
import re
import uuid

from starlette.requests import Request

from router.openai.errors import refused

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,96}")


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request.

    Attributes:
        request_id: the client's `X-Request-Id`, else one made here; sent back in the same header.
        is_clients: the client chose the id, so another request may have the same.
        timeout_s: seconds from arrival until the client wants no answer any more; None for ever.
    """

    request_id: str
    is_clients: bool = False
    timeout_s: float | None = None

    @classmethod
    def of(cls, request: Request) -> Call:
        """Reads the headers; ApiError where one of them is not valid."""
        given = request.headers.get("x-request-id")
        if given is None:
            return cls(new_id(), timeout_s=_timeout_s(request))
        if not _REQUEST_ID.fullmatch(given):
            raise refused("X-Request-Id", "must have 1 to 96 visible ASCII characters")
        return cls(given, is_clients=True, timeout_s=_timeout_s(request))

    def answer_id(self, kind: str) -> str:
        """The id in the answer's body."""
        return f"{kind}-{self.request_id}"

    def pipeline_ids(self, kind: str, num_prompts: int) -> list[str]:
        """Names of this call's prompts in logs and traces, unlike those of any other call."""
        answer_id = self.answer_id(kind)
        if self.is_clients:
            answer_id += f"-{new_id()[:8]}"
        return [answer_id] if num_prompts == 1 else [f"{answer_id}-{index}" for index in range(num_prompts)]


def new_id() -> str:
    """An id that nobody else has."""
    return uuid.uuid4().hex


def _timeout_s(request: Request) -> float | None:
    given = request.headers.get("x-request-timeout-s")
    if given is None:
        return None
    try:
        timeout_s = float(given)
    except ValueError:
        timeout_s = math.nan
    if not 0 < timeout_s < math.inf:
        raise refused("X-Request-Timeout-S", f"must be a number of seconds above 0, got {given[:50]!r}")
    return timeout_s
