"""Panels that prefill and decode workers have in common."""

from __future__ import annotations

from deploy.grafana.dashboard import Row
from deploy.grafana.panels import Heatmap, Query, TimeSeries
from deploy.grafana.promql import buckets, quantile, rate, share


def steps(where: str) -> Row:
    """The engine loop."""
    return Row(
        "Engine",
        (
            TimeSeries(
                title="Step time",
                description="One pass of the engine. A decode step is the least time between two tokens of every "
                "stream.",
                queries=(
                    Query(quantile(0.5, "baton_step_seconds", where, by="worker"), "{{worker}} p50"),
                    Query(quantile(0.99, "baton_step_seconds", where, by="worker"), "{{worker}} p99"),
                ),
                unit="s",
            ),
            Heatmap(
                title="Tokens in a step",
                description="How full the batches are. A decode step computes one token for each running sequence, "
                "and a chunk of local prefill.",
                queries=(Query(buckets("baton_step_tokens", where), "{{le}}"),),
                unit="short",
            ),
            TimeSeries(
                title="Busy",
                description="Share of time in which the engine computes.",
                queries=(Query(rate("baton_step_seconds_sum", where, by="worker"), "{{worker}}"),),
                unit="percentunit",
                maximum=1,
            ),
        ),
    )


def cache(where: str) -> Row:
    """The KV pool and its prefix cache."""
    return Row(
        "KV pool",
        (
            TimeSeries(
                title="KV blocks in use",
                description="Share of blocks that requests hold; those that are only cached are free.",
                queries=(Query(f"max by (worker) (baton_kv_cache_usage_ratio{{{where}}})", "{{worker}}"),),
                unit="percentunit",
                maximum=1,
                thresholds=((0.95, "red"),),
            ),
            TimeSeries(
                title="Prefix cache hit ratio",
                description="Share of looked-up prompt tokens that this worker had, counted once a request.",
                queries=(
                    Query(
                        share(
                            "baton_prefix_cache_hits_total",
                            where,
                            "baton_prefix_cache_queries_total",
                            where,
                            by="worker",
                        ),
                        "{{worker}}",
                    ),
                ),
                unit="percentunit",
                maximum=1,
            ),
            TimeSeries(
                title="Pool size",
                description="KV blocks of each pool. Workers of a role should agree.",
                queries=(Query(f"max by (worker) (baton_kv_cache_blocks{{{where}}})", "{{worker}}"),),
                unit="short",
            ),
        ),
    )


def ends(where: str) -> Row:
    """What ended early, and the process."""
    return Row(
        "Early ends and process",
        (
            TimeSeries(
                title="Early ends",
                description="Cancelled attempts are clients that left, or retries; leases run out when a router dies; "
                "a failed step ends the requests of its batch.",
                queries=(
                    Query(rate("baton_worker_requests_cancelled_total", where, by="worker"), "{{worker}} cancelled"),
                    Query(rate("baton_lease_expiries_total", where, by="worker"), "{{worker}} lease ran out"),
                    Query(rate("baton_step_failures_total", where, by="worker"), "{{worker}} step failed"),
                ),
                unit="ops",
            ),
            TimeSeries(
                title="CPU",
                description="Cores in use; on a GPU one is the engine thread.",
                queries=(Query(rate("process_cpu_seconds_total", where, by="worker"), "{{worker}}"),),
                unit="suffix: cores",
            ),
            TimeSeries(
                title="Memory",
                description="Resident memory of the process, the KV pool of a CPU worker included.",
                queries=(Query(f"max by (worker) (process_resident_memory_bytes{{{where}}})", "{{worker}}"),),
                unit="bytes",
            ),
        ),
    )
