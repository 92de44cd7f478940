"""What happened to one request, filled in while it happens."""

from __future__ import annotations

import dataclasses

from bench.load.requests import LoadRequest

# The error of a request that was under way when its run was stopped.
CANCELLED = "cancelled"


@dataclasses.dataclass(slots=True)
class Outcome:
    """One request as its client saw it. All times are seconds of `time.perf_counter`.

    Attributes:
        scheduled_s: when it was due; latencies count from here, so that a generator that is late hides nothing
            (coordinated omission).
        sent_s: when it was sent; None if it never was.
        token_times_s: when each event that carried tokens arrived.
        token_counts: how many tokens each of these carried.
        completion_tokens: the server's own count, which wins over the counted ones; None where it told none.
        token_ids, text: the answer; token ids only where the server sends them.
        error: the gRPC status name of what ended it early, in lower case ("resource_exhausted"); `CANCELLED`
            where the run was stopped; None for an answer that is complete.
        ended_s: when the answer was complete or failed.
    """

    request: LoadRequest
    scheduled_s: float
    sent_s: float | None = None
    token_times_s: list[float] = dataclasses.field(default_factory=list)
    token_counts: list[int] = dataclasses.field(default_factory=list)
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    token_ids: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    error: str | None = None
    error_message: str = ""
    ended_s: float | None = None

    def add_tokens(self, at_s: float, count: int) -> None:
        """Tokens have arrived."""
        self.token_times_s.append(at_s)
        self.token_counts.append(count)

    @property
    def ok(self) -> bool:
        """Whether the answer is complete."""
        return self.error is None and self.ended_s is not None

    @property
    def output_tokens(self) -> int:
        """Tokens that were generated, by the server's count where it told one."""
        return sum(self.token_counts) if self.completion_tokens is None else self.completion_tokens

    @property
    def lag_s(self) -> float | None:
        """How late the generator sent it."""
        return None if self.sent_s is None else self.sent_s - self.scheduled_s

    @property
    def ttft_s(self) -> float | None:
        """Time to first token: from when the request was due to the first event with a token."""
        return self.token_times_s[0] - self.scheduled_s if self.token_times_s else None

    @property
    def latency_s(self) -> float | None:
        """From when the request was due to the end of its answer."""
        return None if self.ended_s is None else self.ended_s - self.scheduled_s

    @property
    def itl_s(self) -> list[float]:
        """Inter-token latencies: the gaps between events with tokens. An event with several is one gap, as in vLLM."""
        return [after - before for before, after in zip(self.token_times_s, self.token_times_s[1:], strict=False)]

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first: from the first token to the last, over the tokens after the first.

        None with fewer than two tokens. vLLM's benchmark and DistServe (OSDI 2024) define it so.
        """
        if not self.token_times_s or self.output_tokens < 2:
            return None
        return (self.token_times_s[-1] - self.token_times_s[0]) / (self.output_tokens - 1)
