from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from baton.errors import (
    BatonError,
    CancelledRequestError,
    DeadlineError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
)
from baton.internal.v1 import transfer_pb2, worker_pb2
from baton.metrics import ClusterMetrics, RouterMetrics
from baton.requests import FinishReason, SamplingParams
from baton.v1 import inference_pb2
from bench.mock_workers.cluster import MockCluster
from router.accounting import Accounting, ClusterAccounting, Objectives
from router.admission import Entry
from router.detokenization import WindowDetokenizer
from router.emission import Emission
from router.job import Job, Prompt
from router.ledger import Charge
from router.placement import Decision, Placement
from router.request_state import Attempt
from router.snapshot import ClusterSnapshot, WorkerKey, WorkerView
from tests.router.conftest import StartRouter, next_of, request_of

OBJECTIVES = Objectives(ttft_s=1.0, tpot_s=0.1)
NUM_PROMPT = 100


class Books:
    """An `Accounting` and what it wrote."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.accounting = Accounting(RouterMetrics(self.registry), OBJECTIVES, clock=lambda: 10.5)

    def value(self, name: str, **labels: str) -> float:
        value = self.registry.get_sample_value(f"baton_{name}", labels)
        assert value is not None, f"baton_{name} {labels} is not there"
        return value

    def slo(self) -> dict[tuple[str, str], float]:
        """(ttft, tpot) of all that were judged."""
        verdicts = ("met", "missed")
        counts = {(a, b): self.value("slo_requests_total", ttft=a, tpot=b) for a in verdicts for b in verdicts}
        return {verdict: count for verdict, count in counts.items() if count}


@pytest.fixture
def books() -> Books:
    return Books()


def make_job(*, remote: bool = True, n: int = 1, cached: int | None = None, at_decode_worker: int = 0) -> Job:
    """Arrived at 10.0, under way on decode-0."""
    sampling = SamplingParams(max_tokens=50, n=n)
    token_ids = tuple(range(NUM_PROMPT))
    prompt = Prompt(
        token_ids=token_ids, sampling=sampling, stops=(), block_hashes=(), salt_root=b"", block_size=16, priority=0
    )
    job = Job(
        request_id="r",
        prompt=prompt,
        emission=Emission(sampling, (), functools.partial(WindowDetokenizer, lambda ids: "x" * len(ids))),
        entry=Entry(0, 0, prompt.demand()),
        arrived_at=10.0,
        deadline=None,
    )
    job.attempt = Attempt(transfer_pb2.AttemptRef(), Charge(placement_of("decode-0", remote=remote), 0, 0), [0] * n)
    job.attempt.progress.decode_cached_tokens = at_decode_worker
    job.cached_tokens = cached
    return job


def placement_of(decode: str, *, remote: bool = True) -> Placement:
    return Placement(
        decode=WorkerKey(decode, 1),
        prefill=WorkerKey("prefill-0", 2) if remote else None,
        decision=Decision.REMOTE if remote else Decision.LOCAL_SHORT,
        blocks=0,
        prefill_tokens=0,
        cost=0.0,
    )


def send(books: Books, job: Job, now: float, *, choice: int = 0, num_tokens: int = 1) -> None:
    tokens = [worker_pb2.TokenOut(choice=choice, token_id=5) for _ in range(num_tokens)]
    job.emission.take(tokens)
    books.accounting.sent(job, choice, num_tokens, job.note_sent(choice, num_tokens, now), now)


def finish(books: Books, job: Job, now: float) -> None:
    job.emission.choices[0].finish_reason = FinishReason.LENGTH
    books.accounting.finished(job, inference_pb2.StageTimings(queue_s=0.25, prefill_s=0.5), now)


class TestLatencies:
    def test_first_token_and_gaps(self, books: Books) -> None:
        job = make_job()
        for now in (10.4, 10.6, 11.2):
            send(books, job, now)
        assert books.value("time_to_first_token_seconds_sum") == pytest.approx(0.4)
        assert books.value("inter_token_latency_seconds_count") == 2
        assert books.value("inter_token_latency_seconds_sum") == pytest.approx(0.8)

    def test_tokens_of_one_message_share_the_time_since_the_one_before(self, books: Books) -> None:
        job = make_job()
        send(books, job, 10.4)
        send(books, job, 10.6, num_tokens=4)
        assert books.value("inter_token_latency_seconds_count") == 4
        assert books.value("inter_token_latency_seconds_bucket", le="0.075") == 4
        assert books.value("generation_tokens_total") == 5

    def test_each_choice_has_gaps_of_its_own(self, books: Books) -> None:
        job = make_job(n=2)
        send(books, job, 10.4, choice=0)
        send(books, job, 10.6, choice=1)
        send(books, job, 10.7, choice=0)
        send(books, job, 10.7, choice=1)
        finish(books, job, 10.7)
        assert books.value("time_to_first_token_seconds_count") == 1
        assert books.value("inter_token_latency_seconds_sum") == pytest.approx(0.4)
        assert books.value("request_time_per_output_token_seconds_sum") == pytest.approx(0.2)

    def test_a_finished_request_has_stages_and_an_end(self, books: Books) -> None:
        job = make_job()
        books.accounting.accepted(job)
        send(books, job, 10.4)
        finish(books, job, 12.0)
        assert books.value("e2e_request_latency_seconds_sum") == pytest.approx(2.0)
        stages = {
            stage: books.value("request_stage_seconds_sum", stage=stage) for stage in ("intake", "queue", "prefill")
        }
        assert stages == {"intake": 0.5, "queue": 0.25, "prefill": 0.5}
        # One token has no pace.
        assert books.value("request_time_per_output_token_seconds_count") == 0


class TestPrompts:
    @pytest.mark.parametrize(
        ("remote", "cached", "at_decode_worker", "sources", "computed"),
        [
            (True, 0, 0, {"kv_transfer": 100}, 100),
            (True, 64, 32, {"kv_transfer": 68, "local_cache_hit": 32}, 36),
            (False, None, 96, {"local_compute": 4, "local_cache_hit": 96}, 4),
        ],
    )
    def test_are_counted_by_source(
        self,
        books: Books,
        remote: bool,
        cached: int | None,
        at_decode_worker: int,
        sources: dict[str, int],
        computed: int,
    ) -> None:
        """Cached are those that nobody computed: of a remote prefill what the prefill worker had."""
        job = make_job(remote=remote, cached=cached, at_decode_worker=at_decode_worker)
        send(books, job, 10.4)
        for source in ("kv_transfer", "local_cache_hit", "local_compute"):
            assert books.value("prompt_tokens_by_source_total", source=source) == sources.get(source, 0)
        assert books.value("prompt_tokens_total") == NUM_PROMPT
        assert books.value("prompt_tokens_cached_total") == NUM_PROMPT - computed
        assert books.value("request_prefill_computed_tokens_sum") == computed

    def test_count_once_whatever_follows(self, books: Books) -> None:
        job = make_job(cached=0)
        send(books, job, 10.4)
        job.attempt = make_job(cached=96).attempt
        send(books, job, 10.6)
        finish(books, job, 10.7)
        assert books.value("prompt_tokens_total") == NUM_PROMPT
        assert books.value("prompt_tokens_cached_total") == 0

    def test_count_where_nothing_is_generated(self, books: Books) -> None:
        finish(books, make_job(cached=0), 10.7)
        assert books.value("prompt_tokens_total") == NUM_PROMPT

    def test_what_was_asked_for(self, books: Books) -> None:
        books.accounting.accepted(make_job(n=3))
        assert books.value("request_params_n_sum") == 3
        assert books.value("request_params_max_tokens_sum") == 50
        assert books.value("request_prompt_tokens_sum") == NUM_PROMPT


class TestOutcomes:
    @pytest.mark.parametrize(
        ("error", "outcome"),
        [
            (CancelledRequestError("x"), "cancelled"),
            (DeadlineError("x"), "deadline"),
            (InternalError("x"), "failed"),
        ],
    )
    def test_of_accepted_requests(self, books: Books, error: BatonError, outcome: str) -> None:
        books.accounting.failed(make_job(), error, 10.2)
        assert books.value("requests_total", outcome=outcome) == 1

    @pytest.mark.parametrize("make", [make_job, lambda: None])
    def test_a_client_s_mistake_is_a_refusal_whoever_finds_it(self, books: Books, make: Callable[[], Any]) -> None:
        books.accounting.failed(make(), InvalidRequestError("n", "x"), 10.2)
        assert books.value("requests_rejected_total", reason="invalid_argument") == 1
        assert books.value("requests_total", outcome="failed") == 0

    @pytest.mark.parametrize(
        ("error", "outcome"), [(DeadlineError("x"), "deadline"), (CancelledRequestError("x"), "cancelled")]
    )
    def test_one_that_ends_before_it_was_accepted_is_not_refused(
        self, books: Books, error: BatonError, outcome: str
    ) -> None:
        books.accounting.failed(None, error, 10.2)
        assert books.value("requests_total", outcome=outcome) == 1

    def test_a_full_queue_refuses(self, books: Books) -> None:
        books.accounting.failed(None, OverloadedError("x"), 10.2)
        assert books.value("requests_rejected_total", reason="resource_exhausted") == 1

    def test_a_stream_that_goes_on_elsewhere_has_moved(self, books: Books) -> None:
        job = make_job()
        books.accounting.placed(job, placement_of("decode-0"))
        books.accounting.placed(job, placement_of("decode-1"))
        assert books.value("request_migrations_total") == 0
        send(books, job, 10.4)
        books.accounting.placed(job, placement_of("decode-1"))
        assert books.value("request_migrations_total") == 0
        books.accounting.placed(job, placement_of("decode-0"))
        assert books.value("request_migrations_total") == 1
        assert books.value("prefill_decisions_total", decision="remote") == 4


class TestObjectives:
    def test_are_told(self, books: Books) -> None:
        assert books.value("slo_target_seconds", objective="ttft") == 1.0
        assert books.value("slo_target_seconds", objective="tpot") == 0.1

    @pytest.mark.parametrize(
        ("tokens_at", "verdict"),
        [
            ([10.9, 11.0, 11.1], ("met", "met")),
            ([11.1, 11.2], ("missed", "met")),
            ([10.5, 11.5], ("met", "missed")),
            ([12.0, 14.0], ("missed", "missed")),
            ([10.5], ("met", "met")),
        ],
    )
    def test_judge_each_request_once(self, books: Books, tokens_at: list[float], verdict: tuple[str, str]) -> None:
        job = make_job()
        for now in tokens_at:
            send(books, job, now)
        finish(books, job, tokens_at[-1])
        assert books.slo() == {verdict: 1}

    def test_one_that_gave_up_waiting_has_missed(self, books: Books) -> None:
        books.accounting.failed(make_job(), CancelledRequestError("x"), 11.5)
        assert books.slo() == {("missed", "met"): 1}

    def test_one_that_left_early_tells_nothing(self, books: Books) -> None:
        books.accounting.failed(make_job(), CancelledRequestError("x"), 10.5)
        assert books.slo() == {}


def view(name: str, role: str, epoch: int = 1, *, connected: bool = True) -> WorkerView:
    return WorkerView(key=WorkerKey(name, epoch), role=role, connected=connected)


def test_workers_are_counted_as_they_come_and_go() -> None:
    registry = CollectorRegistry()
    accounting = ClusterAccounting(ClusterMetrics(registry))

    def values(name: str) -> list[float | None]:
        return [registry.get_sample_value(name, {"worker_role": role}) for role in ("prefill", "decode")]

    first = ClusterSnapshot(prefill=(view("p", "prefill"),), decode=(view("d", "decode", connected=False),))
    accounting.changed(first, None)
    assert values("baton_workers") == [1, 0]
    assert values("baton_worker_joins_total") == [1, 1]
    connected = dataclasses.replace(first, decode=(view("d", "decode"),))
    accounting.changed(connected, WorkerKey("d", 1))
    assert values("baton_workers") == [1, 1]
    accounting.changed(dataclasses.replace(connected, decode=(view("d", "decode", epoch=2),)), None)
    assert values("baton_worker_joins_total") == [1, 2]
    assert values("baton_worker_departures_total") == [0, 1]


async def test_a_cancelled_call_of_a_real_router(start_router: StartRouter) -> None:
    async with MockCluster(step_s=0.01) as cluster, start_router(cluster) as client:
        call = client.stream(request_of(max_tokens=400))
        await next_of(call)
        call.cancel()
        await cluster.decode[0].until(lambda: cluster.decode[0].cancelled)
        registry = client.server._registry
        assert registry.get_sample_value("baton_requests_total", {"outcome": "cancelled"}) == 1
        assert registry.get_sample_value("baton_requests_running") == 0
