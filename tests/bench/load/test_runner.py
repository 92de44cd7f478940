"""When requests are sent, and from when their latencies count."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from baton.errors import InvalidRequestError, OverloadedError
from bench.load.outcome import CANCELLED, Outcome
from bench.load.requests import LoadRequest, Turn
from bench.load.runner import run_load, warm_up
from tests.bench.load.outcomes import ScriptedTarget


def closed(count: int) -> Iterator[LoadRequest]:
    return (LoadRequest([index], 2) for index in range(count))


async def test_a_closed_loop_never_has_more_under_way_than_its_concurrency() -> None:
    target = ScriptedTarget()
    run = await run_load(target, closed(20), concurrency=3)
    assert target.sent == [[index] for index in range(20)]
    assert target.most_at_once == 3
    assert [outcome.output_tokens for outcome in run.outcomes] == [2] * 20
    assert not run.interrupted
    assert run.started_s <= run.outcomes[0].scheduled_s <= run.ended_s


async def test_an_open_loop_sends_at_its_times_whatever_the_server_does() -> None:
    target = ScriptedTarget()
    target.gate.clear()
    requests = [LoadRequest([index], 2, arrival_s=index * 0.01) for index in range(5)]
    running = asyncio.create_task(run_load(target, requests))
    while len(target.sent) < 5:
        target.arrived.clear()
        await target.arrived.wait()
    target.gate.set()
    run = await running
    assert target.most_at_once == 5
    for request, outcome in zip(requests, run.outcomes, strict=True):
        assert request.arrival_s is not None
        assert outcome.scheduled_s == run.started_s + request.arrival_s
        assert outcome.sent_s is not None
        assert outcome.sent_s >= outcome.scheduled_s


async def test_a_request_that_waits_for_room_counts_from_when_it_was_due() -> None:
    target = ScriptedTarget()
    target.gate.clear()
    running = asyncio.create_task(
        run_load(target, [LoadRequest([i], 2, arrival_s=0.0) for i in range(2)], concurrency=1)
    )
    await target.arrived.wait()
    target.gate.set()
    first, second = (await running).outcomes
    assert first.scheduled_s == second.scheduled_s
    assert target.most_at_once == 1
    assert first.ended_s is not None
    assert second.lag_s is not None
    assert second.ttft_s is not None
    assert second.lag_s >= first.ended_s - first.scheduled_s
    assert second.ttft_s >= second.lag_s


async def test_requests_are_made_as_their_times_come() -> None:
    target = ScriptedTarget()
    made = 0

    def requests() -> Iterator[LoadRequest]:
        nonlocal made
        while True:
            made += 1
            yield LoadRequest([made], 2, arrival_s=0.0 if made < 3 else 3600.0)

    stop = asyncio.Event()
    running = asyncio.create_task(run_load(target, requests(), stop=stop))
    while len(target.sent) < 2:
        target.arrived.clear()
        await target.arrived.wait()
    stop.set()
    run = await running
    assert made == 3
    assert len(run.outcomes) == 2


async def test_the_turns_of_a_conversation_follow_its_answers_and_keep_its_room() -> None:
    target = ScriptedTarget()
    conversations = [LoadRequest([index], 2, follow_ups=(Turn([8], 2), Turn([9], 2))) for index in (1, 2)]
    run = await run_load(target, conversations, concurrency=1)
    assert target.sent == [
        *([1], [1, 4, 5, 8], [1, 4, 5, 8, 4, 5, 9]),
        *([2], [2, 4, 5, 8], [2, 4, 5, 8, 4, 5, 9]),
    ]
    assert len(run.outcomes) == 6
    first, second, _ = run.outcomes[:3]
    assert first.ended_s is not None
    assert second.scheduled_s >= first.ended_s


async def test_the_user_thinks_before_the_next_turn() -> None:
    run = await run_load(ScriptedTarget(), [LoadRequest([1], 2, follow_ups=(Turn([8], 2, 0.01),))], concurrency=1)
    first, second = run.outcomes
    assert first.ended_s is not None
    assert second.scheduled_s >= first.ended_s + 0.01


async def test_what_is_refused_is_an_outcome_and_ends_its_conversation() -> None:
    def fail(request: LoadRequest) -> OverloadedError | None:
        return OverloadedError("the queue is full") if request.prompt == [1] else None

    seen: list[Outcome] = []
    turns = (Turn([8], 2),)
    requests = [LoadRequest([index], 2, follow_ups=turns) for index in (1, 2)]
    run = await run_load(ScriptedTarget(fail), requests, concurrency=1, on_ended=seen.append)
    refused, *others = run.outcomes
    assert (refused.error, refused.error_message, refused.ok) == ("resource_exhausted", "the queue is full", False)
    assert refused.token_counts == [1]
    assert [outcome.ok for outcome in others] == [True, True]
    assert seen == run.outcomes


async def test_stopping_ends_what_is_under_way_and_keeps_what_there_is() -> None:
    target = ScriptedTarget()
    stop = asyncio.Event()

    def when_ended(outcome: Outcome) -> None:
        target.gate.clear()
        target.arrived.clear()

    running = asyncio.create_task(run_load(target, closed(9), concurrency=1, stop=stop, on_ended=when_ended))
    while len(target.sent) < 2:
        target.arrived.clear()
        await target.arrived.wait()
    stop.set()
    run = await running
    assert run.interrupted
    assert [outcome.error for outcome in run.outcomes] == [None, CANCELLED]


async def test_a_fault_of_the_generator_is_raised() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        await run_load(ScriptedTarget(), [LoadRequest([1], 2)])
    assert caught.group_contains(AssertionError, match="need a concurrency")


async def test_a_warm_up_that_fails_is_an_error() -> None:
    target = ScriptedTarget(lambda request: InvalidRequestError("token_ids", "no") if request.prompt == [1] else None)
    with pytest.raises(InvalidRequestError, match="token_ids: no"):
        await warm_up(target, closed(3))
    assert len(target.sent) == 3
