from __future__ import annotations

import pathlib
import re

import pytest
from prometheus_client import CollectorRegistry, generate_latest

import baton
from baton.config import TransferConfig
from baton.errors import BatonError
from baton.metrics import (
    ClusterMetrics,
    GrpcMetrics,
    HttpMetrics,
    ProcessMetrics,
    RouterMetrics,
    SchedulerMetrics,
    TransferMetrics,
    buckets,
    describe_cache,
    router,
    transfer,
)
from baton.metrics.families import Families
from baton.metrics.reference import Series, catalogue, render
from kvtransfer import transports
from router.placement import Decision
from router.recovery import FailureKind

DOCS = pathlib.Path(__file__).parents[2] / "docs"
SERIES = [series for group in catalogue().values() for series in group]


def test_docs_metrics_md_is_up_to_date() -> None:
    """`python -m baton.metrics > docs/metrics.md` makes it so."""
    assert (DOCS / "metrics.md").read_text() == render()


def test_one_registry_takes_all_of_a_router_and_another_all_of_a_worker() -> None:
    of_router, of_worker = CollectorRegistry(), CollectorRegistry()
    for metrics in (ProcessMetrics, RouterMetrics, ClusterMetrics, HttpMetrics, GrpcMetrics):
        metrics(of_router)
    for of_role in (ProcessMetrics, SchedulerMetrics, TransferMetrics):
        of_role(of_worker)
    describe_cache(of_worker, block_size=16, num_blocks=8, dtype="float32", prefix_cache=True, num_groups=1)
    for registry in (of_router, of_worker):
        assert registry.get_sample_value("baton_build_info", {"version": baton.__version__}) == 1
        text = generate_latest(registry).decode()
        assert "process_resident_memory_bytes" in text
        assert "python_gc_collections_total" in text
        assert "_created" not in text
    info = {"block_size": "16", "num_blocks": "8", "dtype": "float32", "prefix_cache": "true", "num_groups": "1"}
    assert of_worker.get_sample_value("baton_cache_config_info", info) == 1


def test_a_histogram_of_one_writer_is_one_like_any_other() -> None:
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    bounds = (0.5, 1.0, 2.0)
    histograms = [
        Families(theirs).histogram("baton_pace_seconds", "Pace.", bounds),
        Families(ours).single_writer_histogram("baton_pace_seconds", "Pace.", bounds),
    ]
    for amount in (0.25, 0.5, 0.75, 1.0, 1.5, 3.0, 3.0):
        for histogram in histograms:
            histogram.observe(amount)
    without_times = [
        [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]
        for registry in (theirs, ours)
    ]
    assert without_times[0] == without_times[1]


def test_names_are_prefixed_and_unique() -> None:
    names = [series.name for series in SERIES]
    assert len(names) == len(set(names))
    assert [name for name in names if not re.fullmatch(r"baton(_[a-z0-9]+)+", name)] == []
    assert [s.name for s in SERIES if (s.kind == "counter") != s.name.endswith("_total")] == []


@pytest.mark.parametrize("series", SERIES, ids=lambda series: series.name)
def test_a_series_is_described_and_its_labels_do_not_clash_with_those_of_a_target(series: Series) -> None:
    assert series.text.endswith(".")
    assert not {"role", "worker", "model", "job", "instance", "le"} & series.labels.keys()
    if "_ms" in series.name or "_mb" in series.name:
        pytest.fail("units are base units")


def test_labels_have_the_values_of_what_they_count() -> None:
    assert set(router.DECISIONS) == {decision.value for decision in Decision}
    assert set(router.FAILURES) == {kind.value for kind in FailureKind}
    assert set(transfer.TRANSPORTS) == set(transports.TRANSPORTS)
    assert TransferConfig.model_validate({"transports": transfer.TRANSPORTS}).transports == transfer.TRANSPORTS
    assert {"unavailable", "resource_exhausted", "invalid_argument", "internal"} <= set(router.REASONS)
    # Outcomes of their own, and what never becomes a request.
    assert not {"cancelled", "deadline_exceeded", "unauthenticated"} & set(router.REASONS)
    assert {error.status.lower() for error in BatonError.__subclasses__()} <= set(transfer.REASONS)


def test_what_is_known_beforehand_starts_at_zero() -> None:
    registry = CollectorRegistry()
    RouterMetrics(registry)
    TransferMetrics(registry)
    assert registry.get_sample_value("baton_requests_total", {"outcome": "failed"}) == 0
    assert registry.get_sample_value("baton_slo_requests_total", {"ttft": "missed", "tpot": "met"}) == 0
    assert registry.get_sample_value("baton_request_stage_seconds_count", {"stage": "intake"}) == 0
    assert registry.get_sample_value("baton_kv_transfer_failures_total", {"reason": "checksum"}) == 0


def test_buckets_are_those_that_users_of_vllm_know() -> None:
    assert buckets.TTFT[:8] == (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1)
    assert set(buckets.INTER_TOKEN) >= {0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 80.0}
    assert buckets.REQUEST[0] == 0.3
    assert buckets.REQUEST[-1] == 7680.0
    assert buckets.CHOICES == (1, 2, 5, 10, 20)
