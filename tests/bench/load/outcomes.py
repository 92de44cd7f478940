"""Outcomes made by hand, and a target that does what a test says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from baton.errors import BatonError
from bench.load.outcome import Outcome
from bench.load.requests import LoadRequest
from bench.load.targets import ServedModel


def make_outcome(
    *times_s: float,
    scheduled_s: float = 0.0,
    sent_s: float = 0.0,
    ended_s: float | None = None,
    counts: Sequence[int] = (),
    completion_tokens: int | None = None,
    error: str | None = None,
) -> Outcome:
    """One token at each of the times, or as many as `counts` says."""
    outcome = Outcome(LoadRequest([1, 2, 3], 8), scheduled_s, sent_s=sent_s, error=error)
    for at_s, count in zip(times_s, counts or [1] * len(times_s), strict=True):
        outcome.add_tokens(at_s, count)
    outcome.ended_s = ended_s if ended_s is not None else times_s[-1] if times_s else sent_s
    outcome.prompt_tokens, outcome.completion_tokens = 3, completion_tokens
    return outcome


class ScriptedTarget:
    """Answers "4 5", with the error that `fail` gives for a request, when `gate` is open.

    Attributes:
        sent: the prompts, in the order in which they came.
        most_at_once: how many requests were under way together.
    """

    def __init__(self, fail: Callable[[LoadRequest], BatonError | None] = lambda request: None) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.sent: list[object] = []
        self.most_at_once = 0
        self.arrived = asyncio.Event()
        self._fail = fail
        self._num_running = 0

    async def served_model(self) -> ServedModel:
        return ServedModel("scripted", vocab_size=300, max_model_len=512)

    async def send(self, outcome: Outcome) -> None:
        self.sent.append(outcome.request.prompt)
        self._num_running += 1
        self.most_at_once = max(self.most_at_once, self._num_running)
        self.arrived.set()
        try:
            # Others get to run, as over a network.
            await asyncio.sleep(0)
            await self.gate.wait()
            outcome.add_tokens(time.perf_counter(), 1)
            if (error := self._fail(outcome.request)) is not None:
                raise error
            outcome.add_tokens(time.perf_counter(), 1)
            outcome.token_ids, outcome.text = [4, 5], " four five"
            outcome.prompt_tokens, outcome.completion_tokens = len(outcome.request.prompt), 2
        finally:
            self._num_running -= 1

    async def close(self) -> None:
        """Nothing is open."""
