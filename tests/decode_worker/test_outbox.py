"""Tokens on their way to routers: sent once, kept until acknowledged, resent from cursors."""

from __future__ import annotations

import asyncio

import pytest

from baton.internal.v1 import worker_pb2
from baton.requests import AttemptRef, FinishReason, RequestSpec, SamplingParams
from baton.v1 import inference_pb2
from baton.wire import ref_to_wire, token_of_choice
from decode_worker.outbox import Mailbox, Outbox

REF = AttemptRef("r", 1)


def opened(outbox: Outbox, ref: AttemptRef = REF, router_id: str = "router") -> Mailbox:
    spec = RequestSpec(
        ref=ref, router_id=router_id, prompt_token_ids=(1,), sampling=SamplingParams(max_tokens=9), max_unacked_tokens=3
    )
    return outbox.open(spec)


def publish(outbox: Outbox, mailbox: Mailbox, *positions: int) -> None:
    lane = mailbox.lanes[0]
    tokens = [
        (lane, token_of_choice(lane.template, position, 100 + position, None, FinishReason.NONE))
        for position in positions
    ]
    outbox.publish(tokens, [])


def finish(outbox: Outbox, mailbox: Mailbox, ref: AttemptRef = REF) -> None:
    update = worker_pb2.RequestUpdate(ref=ref_to_wire(ref), state=worker_pb2.REQUEST_STATE_FINISHED)
    outbox.publish([], [(mailbox, update)])
    outbox.complete(ref)


def cursor(position: int, ref: AttemptRef = REF) -> worker_pb2.Cursor:
    return worker_pb2.Cursor(ref=ref_to_wire(ref), choice=0, position=position)


def positions(output: worker_pb2.StepOutput) -> list[int]:
    return [token.position for token in output.tokens]


async def test_the_first_message_is_empty_and_then_each_step_is_one_message() -> None:
    outbox = Outbox()
    mailbox = opened(outbox)
    stream = outbox.attach("router", [])
    assert positions(await anext(stream)) == []
    publish(outbox, mailbox, 0)
    assert positions(await anext(stream)) == [0]
    publish(outbox, mailbox, 1)
    assert positions(await anext(stream)) == [1]
    await stream.aclose()


async def test_a_router_that_is_busy_gets_several_steps_in_one_message() -> None:
    outbox = Outbox()
    mailbox = opened(outbox)
    stream = outbox.attach("router", [])
    await anext(stream)
    publish(outbox, mailbox, 0)
    publish(outbox, mailbox, 1, 2)
    assert positions(await anext(stream)) == [0, 1, 2]
    await stream.aclose()


async def test_reattaching_resumes_from_the_cursors_without_loss_or_duplicate() -> None:
    outbox = Outbox()
    mailbox = opened(outbox)
    stream = outbox.attach("router", [])
    await anext(stream)
    publish(outbox, mailbox, 0, 1, 2)
    await anext(stream)
    await stream.aclose()
    publish(outbox, mailbox, 3)
    again = outbox.attach("router", [cursor(2)])
    assert positions(await anext(again)) == [2, 3]
    publish(outbox, mailbox, 4)
    assert positions(await anext(again)) == [4]
    await again.aclose()


async def test_a_second_stream_of_a_router_ends_the_first() -> None:
    outbox = Outbox()
    first = outbox.attach("router", [])
    await anext(first)
    second = outbox.attach("router", [])
    await anext(second)
    assert [output async for output in first] == []
    await second.aclose()


async def test_routers_hear_only_of_their_own_requests() -> None:
    outbox = Outbox()
    other = AttemptRef("other", 1)
    mine = opened(outbox, router_id="router-a")
    theirs = opened(outbox, other, "router-b")
    stream = outbox.attach("router-a", [])
    await anext(stream)
    publish(outbox, theirs, 0)
    publish(outbox, mine, 0)
    output = await anext(stream)
    assert [token.ref.request_id for token in output.tokens] == ["r"]
    await stream.aclose()


async def test_what_is_acknowledged_is_dropped_and_an_ended_attempt_goes_with_its_last_token() -> None:
    outbox = Outbox()
    mailbox = opened(outbox)
    publish(outbox, mailbox, 0, 1, 2)
    assert len(mailbox.lanes[0].tokens) == 3
    assert outbox.acknowledge([cursor(2)]) == []
    assert len(mailbox.lanes[0].tokens) == 1
    finish(outbox, mailbox)
    assert outbox.acknowledge([cursor(3)]) == [REF]
    assert outbox.num_records == 0


async def test_nothing_is_kept_of_a_forgotten_attempt() -> None:
    outbox = Outbox()
    mailbox = opened(outbox)
    publish(outbox, mailbox, 0)
    outbox.forget(REF)
    publish(outbox, mailbox, 1)
    assert outbox.num_records == 0
    stream = outbox.attach("router", [])
    assert positions(await anext(stream)) == []
    await stream.aclose()


async def test_publishing_from_another_thread_wakes_the_stream() -> None:
    outbox = Outbox()
    mailbox = opened(outbox)
    stream = outbox.attach("router", [])
    await anext(stream)
    _, output = await asyncio.gather(asyncio.to_thread(publish, outbox, mailbox, 0), anext(stream))
    assert positions(output) == [0]
    await stream.aclose()


def publish_scores(outbox: Outbox, mailbox: Mailbox, *starts: int) -> None:
    position = inference_pb2.PositionLogprobs(sampled=inference_pb2.TokenLogprob(token_id=7, logprob=-1.0))
    scores = [
        worker_pb2.PromptLogprobs(ref=ref_to_wire(REF), start=start, positions=[position] * 10) for start in starts
    ]
    outbox.publish([], [], [(mailbox, score) for score in scores])


def starts(output: worker_pb2.StepOutput) -> list[int]:
    return [score.start for score in output.prompt_logprobs]


async def test_prompt_logprobs_come_before_tokens_and_in_messages_of_bounded_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("decode_worker.outbox._SCORE_BYTES", 200)
    outbox = Outbox()
    mailbox = opened(outbox)
    stream = outbox.attach("router", [])
    await anext(stream)
    publish_scores(outbox, mailbox, 1, 11, 21)
    publish(outbox, mailbox, 0)
    outputs = [await anext(stream) for _ in range(2)]
    assert [starts(output) for output in outputs] == [[1, 11], [21]]
    assert [positions(output) for output in outputs] == [[], [0]]
    await stream.aclose()


async def test_prompt_logprobs_are_kept_until_the_first_token_is_acknowledged() -> None:
    outbox = Outbox()
    mailbox = opened(outbox)
    publish_scores(outbox, mailbox, 1, 11)
    stream = outbox.attach("router", [cursor(0)])
    assert starts(await anext(stream)) == [1, 11]
    publish(outbox, mailbox, 0)
    again = outbox.attach("router", [cursor(0)])
    assert starts(await anext(again)) == [1, 11]
    outbox.acknowledge([cursor(1)])
    last = outbox.attach("router", [cursor(1)])
    assert starts(await anext(last)) == []
    for each in (stream, again, last):
        await each.aclose()


async def test_tokens_of_a_choice_that_the_router_has_ended_are_dropped() -> None:
    outbox = Outbox()
    mailbox = opened(outbox)
    publish(outbox, mailbox, 0, 1)
    ended = cursor(1)
    ended.ended = True
    outbox.acknowledge([ended])
    publish(outbox, mailbox, 2)
    stream = outbox.attach("router", [])
    assert positions(await anext(stream)) == []
    finish(outbox, mailbox)
    assert outbox.acknowledge([ended]) == [REF]
    assert outbox.num_records == 0
    await stream.aclose()


async def test_a_lane_is_full_until_its_tokens_are_acknowledged() -> None:
    outbox = Outbox()
    mailbox = opened(outbox)
    publish(outbox, mailbox, 0, 1)
    assert not mailbox.lanes[0].is_full
    publish(outbox, mailbox, 2)
    assert mailbox.lanes[0].is_full
    outbox.acknowledge([cursor(1)])
    assert not mailbox.lanes[0].is_full
