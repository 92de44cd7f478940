"""Sends requests at their times and waits for their answers, on one event loop.

Open loop: a request is sent when it is due, whatever the server does. Closed loop: a request without a time is sent as
soon as fewer than `concurrency` are under way. Both may be combined; what then waits for room is late, and its latency
counts from the time at which it was due.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator

from baton.errors import BatonError
from bench.load.outcome import CANCELLED, Outcome
from bench.load.requests import LoadRequest
from bench.load.targets import Target


@dataclasses.dataclass(frozen=True, slots=True)
class LoadRun:
    """What a run left; times are seconds of `time.perf_counter`.

    Attributes:
        outcomes: of all requests that were due, follow-ups included, in the order in which they were.
        interrupted: whether it was stopped before all were sent and answered.
    """

    outcomes: list[Outcome]
    started_s: float
    ended_s: float
    interrupted: bool

    @property
    def duration_s(self) -> float:
        return self.ended_s - self.started_s


# Called with each outcome that has ended.
OnEnded = Callable[[Outcome], None]


async def run_load(
    target: Target,
    requests: Iterable[LoadRequest],
    *,
    concurrency: int | None = None,
    stop: asyncio.Event | None = None,
    on_ended: OnEnded | None = None,
) -> LoadRun:
    """Sends everything and returns when all answers are there, or soon after `stop` is set.

    `requests` is gone through as their times come, so that it may be made on the way; times must not decrease.

    Args:
        concurrency: most conversations under way at once; None for any number, if every request has a time.
    """
    run = _Run(target, concurrency, on_ended)
    started_s = time.perf_counter()
    feeding = asyncio.create_task(run.feed(iter(requests), started_s))
    stopping = asyncio.create_task((stop or asyncio.Event()).wait())
    try:
        await asyncio.wait([feeding, stopping], return_when=asyncio.FIRST_COMPLETED)
        interrupted = not feeding.done()
    finally:
        stopping.cancel()
        feeding.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await feeding
    return LoadRun(run.outcomes, started_s, time.perf_counter(), interrupted)


async def warm_up(target: Target, requests: Iterable[LoadRequest]) -> None:
    """Sends requests together, without measuring: connections are made, caches filled, kernels compiled.

    Raises:
        BatonError: one failed; a measurement would not be worth its time.
    """
    sends = [target.send(Outcome(request, time.perf_counter())) for request in requests]
    for result in await asyncio.gather(*sends, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


class _Run:
    """The requests under way, and what became of those before."""

    def __init__(self, target: Target, concurrency: int | None, on_ended: OnEnded | None) -> None:
        self.outcomes: list[Outcome] = []
        self._target = target
        self._room = None if concurrency is None else asyncio.Semaphore(concurrency)
        self._on_ended = on_ended

    async def feed(self, requests: Iterator[LoadRequest], started_s: float) -> None:
        """Starts each request when it is due, and waits for all."""
        async with asyncio.TaskGroup() as group:
            for request in requests:
                if request.arrival_s is None:
                    assert self._room is not None, "requests without a time need a concurrency"
                    await self._room.acquire()
                    group.create_task(self._converse(request, time.perf_counter(), has_room=True))
                else:
                    scheduled_s = started_s + request.arrival_s
                    await _sleep_until(scheduled_s)
                    group.create_task(self._converse(request, scheduled_s, has_room=False))

    async def _converse(self, request: LoadRequest, scheduled_s: float, *, has_room: bool) -> None:
        """One request and those that follow it; together they are one of those that `concurrency` limits."""
        outcome = self._due(request, scheduled_s)
        try:
            if self._room is not None and not has_room:
                await self._room.acquire()
                has_room = True
            await self._send(outcome)
            while outcome.ok and (turns := outcome.request.follow_ups):
                scheduled_s = time.perf_counter() + turns[0].think_s
                following = outcome.request.next_turn(text=outcome.text, token_ids=outcome.token_ids)
                await _sleep_until(scheduled_s)
                outcome = self._due(following, scheduled_s)
                await self._send(outcome)
        except asyncio.CancelledError:
            if outcome.ended_s is None:
                self._end(outcome, CANCELLED, "the run was stopped")
            raise
        finally:
            if has_room and self._room is not None:
                self._room.release()

    def _due(self, request: LoadRequest, scheduled_s: float) -> Outcome:
        outcome = Outcome(request, scheduled_s)
        self.outcomes.append(outcome)
        return outcome

    async def _send(self, outcome: Outcome) -> None:
        outcome.sent_s = time.perf_counter()
        try:
            await self._target.send(outcome)
        except BatonError as error:
            self._end(outcome, error.status.lower(), str(error))
        else:
            self._end(outcome, None, "")

    def _end(self, outcome: Outcome, error: str | None, message: str) -> None:
        outcome.ended_s = time.perf_counter()
        outcome.error, outcome.error_message = error, message
        if self._on_ended is not None:
            self._on_ended(outcome)


async def _sleep_until(at_s: float) -> None:
    """Returns at or after a time, after the other tasks had a turn: loops round their timers, early ones as well."""
    await asyncio.sleep(at_s - time.perf_counter())
    while (rest_s := at_s - time.perf_counter()) > 0:  # noqa: ASYNC110 (a clock has no event)
        await asyncio.sleep(rest_s)
