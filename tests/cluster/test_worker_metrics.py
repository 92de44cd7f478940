"""What the two workers count, driven step by step."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest
from prometheus_client import Counter, Gauge, Histogram

from baton.config import DecodeConfig, PrefillConfig
from baton.requests import Delivered
from tests.cluster.oracle import prompt_of
from tests.composed import LEASE_S, Pair
from tests.engine.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def pair(llama: pathlib.Path) -> Iterator[Pair]:
    pair = Pair(
        llama, decode_blocks=16, prefill=PrefillConfig(max_batch_requests=1), decode=DecodeConfig(max_batch_seqs=3)
    )
    yield pair
    pair.close()


def value(metric: Counter | Gauge | Histogram, suffix: str = "", **labels: str) -> float:
    """Of one series of a family, by the suffix of its name."""
    (family,) = metric.collect()
    (found,) = [s.value for s in family.samples if s.name == family.name + suffix and s.labels == labels]
    return found


def test_a_prefix_lookup_counts_once_a_request_at_each_worker(pair: Pair) -> None:
    first = pair.start(pair.spec(prompt_of(40)))
    pair.run()
    retried = pair.spec(
        prompt_of(40), request_id=first.ref.request_id, attempt=2, delivered=[Delivered(tuple(pair.tokens(first)[:3]))]
    )
    pair.start(retried)
    pair.run()
    for metrics in (pair.prefill_metrics, pair.decode_metrics):
        assert value(metrics.prefix_queries, "_total") == 40
        assert value(metrics.prefix_hits, "_total") == 0
    pair.start(pair.spec(prompt_of(40)))
    pair.run()
    for metrics in (pair.prefill_metrics, pair.decode_metrics):
        assert value(metrics.prefix_queries, "_total") == 80
        assert value(metrics.prefix_hits, "_total") == 32


def test_a_prompt_that_waits_is_looked_up_when_it_is_admitted(pair: Pair) -> None:
    """However often its turn is considered before."""
    specs = [pair.start(pair.spec(prompt_of(40, seed))) for seed in range(2)]
    pair.clock.now_s += 2.0
    pair.step_prefill()
    assert value(pair.prefill_metrics.prefix_queries, "_total") == 40
    assert value(pair.prefill_metrics.queue_s, "_sum") == pytest.approx(2.0)
    assert value(pair.prefill_metrics.waiting, reason="queue") == 1
    pair.run()
    assert value(pair.prefill_metrics.prefix_queries, "_total") == 80
    assert value(pair.prefill_metrics.queue_s, "_count") == len(specs)


def test_what_waits_is_told_apart(pair: Pair) -> None:
    pair.start(pair.spec(prompt_of(40)))
    pair.reserve(local := pair.spec(prompt_of(20, 1)), local_prefill=True)
    pair.thread.run_pending()
    assert value(pair.decode_metrics.waiting, reason="transfer") == 1
    assert value(pair.decode_metrics.waiting, reason="local_prefill") == 1
    assert value(pair.decode_metrics.queued_tokens) == 20
    assert value(pair.decode_metrics.running) == 0
    pair.prefill.step()
    pair.run()
    assert len(pair.tokens(local)) == 8
    for reason in ("transfer", "local_prefill"):
        assert value(pair.decode_metrics.waiting, reason=reason) == 0
    for metrics in (pair.prefill_metrics, pair.decode_metrics):
        assert value(metrics.queued_tokens) == 0


async def test_routers_hear_of_the_tokens_that_the_decode_worker_has_yet_to_compute_itself(pair: Pair) -> None:
    states = pair.decode_watch.watch()
    pair.reserve(pair.spec(prompt_of(60)), local_prefill=True)
    assert (await anext(states)).queued_tokens == 60
    assert pair.step_decode()
    assert (await anext(states)).queued_tokens == 60 - DecodeConfig().prefill_chunk_tokens
    assert pair.step_decode()
    assert (await anext(states)).queued_tokens == 0
    await states.aclose()


def test_refusals_say_what_was_lacking(pair: Pair) -> None:
    held = [pair.spec(prompt_of(40, seed)) for seed in range(3)]
    for spec in held:
        pair.reserve(spec)
    assert pair.decode.reserve(pair.spec(prompt_of(10)), local_prefill=False, grammar=None).HasField("refusal")
    assert value(pair.decode_metrics.refused, "_total", reason="sequences") == 1
    pair.decode.cancel(held[0].ref)
    assert pair.decode.reserve(pair.spec(prompt_of(160, 9)), local_prefill=False, grammar=None).HasField("refusal")
    assert value(pair.decode_metrics.refused, "_total", reason="blocks") == 1
    assert value(pair.decode_metrics.cancelled, "_total") == 1
    # A refusal is no lookup.
    assert value(pair.decode_metrics.prefix_queries, "_total") == 3 * 40


def test_leases_that_run_out_and_steps_that_fail(pair: Pair) -> None:
    pair.reserve(pair.spec(prompt_of(20)))
    pair.clock.now_s += LEASE_S + 1
    pair.step_decode()
    assert value(pair.decode_metrics.lease_expiries, "_total") == 1
    for loop, metrics in ((pair.decode, pair.decode_metrics), (pair.prefill, pair.prefill_metrics)):
        loop.fail(RuntimeError("a bug"))
        assert value(metrics.step_failures, "_total") == 1
