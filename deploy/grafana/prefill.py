"""Prefill workers: is there enough of them, and are they busy with work that a cache could have saved."""

from __future__ import annotations

from deploy.grafana import promql, workers
from deploy.grafana.dashboard import Dashboard, Row
from deploy.grafana.panels import Query, TimeSeries
from deploy.grafana.promql import quantile, rate

_WHERE = promql.PREFILL

_WORK = Row(
    "Work",
    (
        TimeSeries(
            title="Prompts",
            description="Prompts that are being computed, and those that wait for blocks or for their turn.",
            queries=(
                Query(f"sum by (worker) (baton_worker_requests_running{{{_WHERE}}})", "{{worker}} running"),
                Query(
                    f'sum by (worker) (baton_worker_requests_waiting{{reason="queue", {_WHERE}}})', "{{worker}} waiting"
                ),
            ),
            unit="short",
            width=6,
        ),
        TimeSeries(
            title="Tokens to compute",
            description="Prompt tokens accepted and not computed yet. Over the pace beside it, the seconds that a new "
            "prompt waits.",
            queries=(Query(f"sum by (worker) (baton_worker_queued_tokens{{{_WHERE}}})", "{{worker}}"),),
            unit="suffix: tok",
            width=6,
        ),
        TimeSeries(
            title="Tokens computed",
            description="Prompt tokens computed each second. Flat while tokens queue up: that is all it can do.",
            queries=(
                Query(rate("baton_computed_tokens_total", f'kind="prefill", {_WHERE}', by="worker"), "{{worker}}"),
            ),
            unit="suffix: tok/s",
            width=6,
        ),
        TimeSeries(
            title="Time in the worker's queue",
            description="From arrival at the worker to admission. When it is most of the time to first token, add "
            "prefill workers.",
            queries=(
                Query(quantile(0.5, "baton_prefill_queue_seconds", _WHERE, by="worker"), "{{worker}} p50"),
                Query(quantile(0.99, "baton_prefill_queue_seconds", _WHERE, by="worker"), "{{worker}} p99"),
            ),
            unit="s",
            width=6,
        ),
    ),
)

PREFILL = Dashboard(
    uid="baton-prefill",
    title="Baton / Prefill",
    description="Prefill workers: queue, pace, batches, caches.",
    worker_role="prefill",
    rows=(_WORK, workers.steps(_WHERE), workers.cache(_WHERE), workers.ends(_WHERE)),
)
