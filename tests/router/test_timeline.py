from __future__ import annotations

import gc

import pytest

from baton.errors import CancelledRequestError, UnavailableError
from baton.requests import FinishReason
from baton.v1 import inference_pb2
from router.job import Job, Prompt
from router.recovery import Failure, FailureKind
from router.timeline import Record, Timeline
from tests.router.jobs import DECODE, PREFILL, Clock, begin_attempt, job_of, send_token

TIMINGS = inference_pb2.StageTimings()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timeline(clock: Clock) -> Timeline:
    return Timeline(clock, max_ended=3)


def stages_of(record: Record, now: float) -> list[tuple[str, float, float]]:
    """(stage, start since arrival, duration) of all legs."""
    return [
        (span.stage, round(span.start_s - record.arrived_at, 3), round(span.end_s - span.start_s, 3))
        for leg in record.legs
        for span in leg.spans(now)
    ]


def run_remote(timeline: Timeline, clock: Clock, job: Job) -> None:
    """One second in each stage from the queue to the first decode step, then four of decoding."""
    timeline.accepted(job)
    clock.now += 1
    attempt = begin_attempt(job, [])
    timeline.admitted(job)
    clock.now += 1
    timeline.placed(job, attempt.placement)
    attempt.progress.first_tokens_at = clock.now + 1
    attempt.progress.transfer_s = 1.0
    attempt.progress.decoding_at = clock.now + 3
    attempt.progress.first_decode_step_s = 1.0
    clock.now += 1
    send_token(job, [timeline], clock.now)
    clock.now += 6
    send_token(job, [timeline], clock.now, FinishReason.LENGTH)
    timeline.finished(job, TIMINGS, clock.now)


class TestStages:
    def test_a_remote_prefill_goes_through_all_stages_without_a_gap(self, timeline: Timeline, clock: Clock) -> None:
        run_remote(timeline, clock, job_of(request_id="mine"))
        (record,) = timeline.ended
        assert stages_of(record, clock.now) == [
            ("queue", 0, 1),
            ("reserve", 1, 1),
            ("prefill", 2, 1),
            ("transfer", 3, 1),
            ("first_decode_step", 4, 1),
            ("decode", 5, 4),
        ]
        assert (record.request_id, record.outcome, record.prompt_tokens, record.generated_tokens) == (
            "mine",
            "length",
            40,
            2,
        )
        assert record.first_token_at == record.arrived_at + 3

    def test_what_runs_ends_now(self, timeline: Timeline, clock: Clock) -> None:
        job = job_of()
        timeline.accepted(job)
        (record,) = timeline.running
        assert stages_of(record, clock.now + 5) == [("queue", 0, 5)]
        assert record.stage == "queue"
        attempt = begin_attempt(job, [timeline])
        assert record.stage == "prefill"
        attempt.progress.first_tokens_at = clock.now + 2
        assert stages_of(record, clock.now + 5) == [
            ("queue", 0, 0),
            ("reserve", 0, 0),
            ("prefill", 0, 2),
            ("transfer", 2, 3),
        ]

    def test_a_local_prefill_has_no_transfer(self, timeline: Timeline, clock: Clock) -> None:
        job = job_of()
        timeline.accepted(job)
        clock.now += 1
        attempt = begin_attempt(job, [timeline], local=True)
        attempt.progress.decoding_at = clock.now + 2
        attempt.progress.prefill_s = 2.0
        (record,) = timeline.running
        assert stages_of(record, clock.now + 3) == [
            ("queue", 0, 1),
            ("reserve", 1, 0),
            ("prefill", 1, 2),
            ("decode", 3, 1),
        ]

    def test_a_worker_that_is_faster_than_its_answer_has_prefilled_all_the_same(
        self, timeline: Timeline, clock: Clock
    ) -> None:
        """The decode worker's tokens may come before the answer to the reservation."""
        job = job_of()
        timeline.accepted(job)
        attempt = begin_attempt(job, [], local=True)
        timeline.admitted(job)
        clock.now += 3
        attempt.progress.decoding_at = clock.now
        attempt.progress.prefill_s = 2.0
        timeline.placed(job, attempt.placement)
        (record,) = timeline.running
        assert stages_of(record, clock.now + 1)[1:3] == [("reserve", 0, 1), ("prefill", 1, 2)]


class TestEnds:
    def test_a_retry_adds_a_leg_and_keeps_the_first(self, timeline: Timeline, clock: Clock) -> None:
        job = job_of()
        timeline.accepted(job)
        begin_attempt(job, [timeline])
        clock.now += 2
        timeline.retried(job, Failure(FailureKind.PREEMPTED, UnavailableError("preempted")))
        clock.now += 1
        begin_attempt(job, [timeline], local=True)
        (record,) = timeline.running
        assert record.num_legs == 2
        assert [leg.failure for leg in record.legs] == ["preempted", ""]
        assert stages_of(record, clock.now + 1) == [
            ("queue", 0, 0),
            ("reserve", 0, 0),
            ("prefill", 0, 2),
            ("queue", 2, 1),
            ("reserve", 3, 0),
            ("prefill", 3, 1),
        ]
        first, second = (leg.placement for leg in record.legs)
        assert first is not None
        assert second is not None
        assert (first.prefill, second.prefill, second.decode) == (PREFILL, None, DECODE)

    def test_a_refusal_leaves_it_in_the_queue(self, timeline: Timeline, clock: Clock) -> None:
        job = job_of()
        timeline.accepted(job)
        timeline.admitted(job)
        clock.now += 1
        timeline.retried(job, Failure(FailureKind.REFUSED, UnavailableError("no room")))
        (record,) = timeline.running
        assert (record.num_legs, stages_of(record, clock.now)) == (1, [("queue", 0, 1)])

    def test_a_cancel_and_a_failure_are_told_apart_and_messages_are_not_kept(
        self, timeline: Timeline, clock: Clock
    ) -> None:
        gone, broken = job_of(), job_of()
        for job in (gone, broken):
            timeline.accepted(job)
        timeline.failed(gone, CancelledRequestError("the client vanished"), clock.now)
        timeline.failed(broken, UnavailableError("what a worker said"), clock.now)
        assert [(record.outcome, record.error) for record in timeline.ended] == [
            ("cancelled", "CANCELLED"),
            ("failed", "UNAVAILABLE"),
        ]

    def test_a_request_that_was_never_accepted_changes_nothing(self, timeline: Timeline, clock: Clock) -> None:
        run_remote(timeline, clock, job_of())
        version = timeline.version
        timeline.failed(None, UnavailableError("draining"), clock.now)
        assert timeline.version == version
        assert [record.outcome for record in timeline.ended] == ["length"]


class TestMemory:
    def test_only_the_last_ended_requests_are_kept(self, timeline: Timeline, clock: Clock) -> None:
        for index in range(10):
            run_remote(timeline, clock, job_of(request_id=f"r{index}", arrived_at=clock.now))
        assert timeline.running == []
        assert [record.request_id for record in timeline.ended] == ["r7", "r8", "r9"]

    def test_endless_preemptions_keep_few_legs_and_their_number(self, timeline: Timeline, clock: Clock) -> None:
        job = job_of()
        timeline.accepted(job)
        for _ in range(100):
            begin_attempt(job, [timeline])
            timeline.retried(job, Failure(FailureKind.PREEMPTED, UnavailableError("preempted")))
        (record,) = timeline.running
        assert record.num_legs == 101
        assert len(record.legs) < 10

    def test_neither_prompt_nor_answer_is_reachable(self, timeline: Timeline, clock: Clock) -> None:
        for _ in range(3):
            run_remote(timeline, clock, job_of(arrived_at=clock.now))
        timeline.accepted(job_of())
        seen: set[int] = set()
        pending: list[object] = [timeline.running, timeline.ended]
        while pending:
            entry = pending.pop()
            if id(entry) in seen or isinstance(entry, type):
                continue
            seen.add(id(entry))
            assert not isinstance(entry, Prompt | Job)
            pending += gc.get_referents(entry)
