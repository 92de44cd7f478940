from __future__ import annotations

import pytest

from baton.v1 import inference_pb2
from router.page.pulse import Percentiles, Pulse, Rate
from router.snapshot import WorkerKey
from tests.router.jobs import DECODE, PREFILL, Clock, begin_attempt, job_of, send_token


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pulse(clock: Clock) -> Pulse:
    return Pulse(clock)


class TestRate:
    def test_counts_the_last_seconds_and_fades(self) -> None:
        rate = Rate()
        assert rate.per_second(100.0) == 0
        for tenth in range(20):
            rate.add(100.0 + tenth / 10, 5)
        assert rate.per_second(102.0) == pytest.approx(50)
        assert 0 < rate.per_second(104.5) < 50
        assert rate.per_second(108.0) == 0

    def test_a_first_token_is_no_peak(self) -> None:
        rate = Rate()
        rate.add(100.0, 1)
        assert rate.per_second(100.0) == 1


def test_percentiles_are_values_that_occurred() -> None:
    assert Percentiles.of([]) is None
    assert Percentiles.of([0.5]) == Percentiles(0.5, 0.5)
    assert Percentiles.of([index / 100 for index in range(101)]) == Percentiles(0.5, 0.99)


def test_latencies_and_tokens(pulse: Pulse, clock: Clock) -> None:
    job = job_of(arrived_at=clock.now - 2)
    pulse.accepted(job)
    begin_attempt(job, [pulse])
    send_token(job, [pulse], clock.now)
    assert pulse.ttft == Percentiles(2.0, 2.0)
    assert pulse.inter_token is None
    clock.now += 0.25
    send_token(job, [pulse], clock.now)
    assert pulse.inter_token == Percentiles(0.25, 0.25)
    assert pulse.generated_per_second == 2.0
    pulse.finished(job, inference_pb2.StageTimings(), clock.now)
    clock.now += 60
    assert pulse.generated_per_second == 0


def test_prefill_and_transfer_are_read_from_what_workers_reported(pulse: Pulse, clock: Clock) -> None:
    """Also where the report of a transfer comes after the request has ended."""
    job = job_of(num_tokens=100)
    pulse.accepted(job)
    progress = begin_attempt(job, [pulse]).progress
    assert pulse.prefilled_per_second == 0
    progress.cached_tokens, progress.first_tokens_at = 40, clock.now
    send_token(job, [pulse], clock.now)
    pulse.finished(job, inference_pb2.StageTimings(), clock.now)
    assert pulse.prefilled_per_second == 60
    assert pulse.last_transfer is None
    progress.sent_bytes, progress.sending_s, progress.transport, progress.sent_at = 1000, 0.5, "shm", clock.now
    progress.transfer_s = 0.125
    assert pulse.transferred_per_second == 1000
    assert pulse.exposed_transfer == Percentiles(0.125, 0.125)
    last = pulse.last_transfer
    assert last is not None
    assert (last.num_bytes, last.bytes_per_second, last.transport) == (1000, 2000, "shm")
    assert pulse.prefix_tallies[PREFILL].cached_tokens == 40


def test_local_prefills_count_for_the_decode_worker(pulse: Pulse, clock: Clock) -> None:
    for local in (True, False):
        job = job_of(num_tokens=10)
        pulse.accepted(job)
        progress = begin_attempt(job, [pulse], local=local).progress
        progress.cached_tokens, progress.decoding_at, progress.first_tokens_at = 5, clock.now, clock.now
        send_token(job, [pulse], clock.now)
    assert pulse.local_share == 0.5
    assert pulse.prefilled_per_second == 10
    assert {key: tally.prompt_tokens for key, tally in pulse.prefix_tallies.items()} == {DECODE: 10, PREFILL: 10}


def test_memory_is_bounded(pulse: Pulse, clock: Clock) -> None:
    for index in range(2000):
        job = job_of()
        pulse.accepted(job)
        attempt = begin_attempt(job, [pulse])
        attempt.placement = attempt.placement.__class__(
            decode=DECODE,
            prefill=WorkerKey("prefill-0", index),
            decision=attempt.placement.decision,
            blocks=1,
            prefill_tokens=1,
            cost=0.0,
        )
        attempt.progress.cached_tokens = 0
        for _ in range(2):
            clock.now += 0.001
            send_token(job, [pulse], clock.now)
        pulse.finished(job, inference_pb2.StageTimings(), clock.now)
    kept = [value for value in vars(pulse).values() if hasattr(value, "__len__")]
    assert len(kept) == 4
    assert max(map(len, kept)) <= 512
