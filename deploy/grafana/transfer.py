"""KV transfers: how fast, how much of it users wait for, and what fails."""

from __future__ import annotations

from deploy.grafana.dashboard import Dashboard, Row
from deploy.grafana.panels import Heatmap, Query, TimeSeries
from deploy.grafana.promql import MODEL, buckets, quantile, rate

_PACE = Row(
    "Pace",
    (
        TimeSeries(
            title="Received",
            description="KV bytes copied in and verified each second, by transport.",
            queries=(Query(rate("baton_kv_received_bytes_total", MODEL, by="transport"), "{{transport}}"),),
            unit="Bps",
            stacked=True,
        ),
        TimeSeries(
            title="Sent, by worker",
            description="KV bytes that each prefill worker sends.",
            queries=(Query(rate("baton_kv_sent_bytes_total", f'role="prefill", {MODEL}', by="worker"), "{{worker}}"),),
            unit="Bps",
            stacked=True,
        ),
        TimeSeries(
            title="Pace of one transfer",
            description="Bytes of a transfer over the time from its first frame to its commit. Frames follow the "
            "prefill's layers, so a slow prefill shows here too.",
            queries=(
                Query(quantile(0.5, "baton_kv_transfer_bytes_per_second", MODEL, by="transport"), "{{transport}} p50"),
                Query(quantile(0.1, "baton_kv_transfer_bytes_per_second", MODEL, by="transport"), "{{transport}} p10"),
            ),
            unit="Bps",
        ),
    ),
)
_WAIT = Row(
    "Time",
    (
        TimeSeries(
            title="What users wait for",
            description="The exposed part of transfers: from the end of prefill to the decode worker's commit. A "
            "small part of the time to first token, unless the network is the bottleneck.",
            queries=(
                Query(quantile(0.5, "baton_request_stage_seconds", f'stage="transfer", {MODEL}'), "p50"),
                Query(quantile(0.99, "baton_request_stage_seconds", f'stage="transfer", {MODEL}'), "p99"),
            ),
            unit="s",
        ),
        TimeSeries(
            title="Whole transfers",
            description="From Open to the answer of Commit; most of it lies beside the prefill.",
            queries=(
                Query(quantile(0.5, "baton_kv_transfer_seconds", MODEL, by="transport"), "{{transport}} p50"),
                Query(quantile(0.99, "baton_kv_transfer_seconds", MODEL, by="transport"), "{{transport}} p99"),
            ),
            unit="s",
        ),
        Heatmap(
            title="Sizes",
            description="Bytes of each transfer: what the decode worker's cache lacked.",
            queries=(Query(buckets("baton_kv_transfer_bytes", MODEL), "{{le}}"),),
            unit="bytes",
        ),
    ),
)
_HEALTH = Row(
    "Health",
    (
        TimeSeries(
            title="Transfers",
            description="Transfers that were committed, by transport.",
            queries=(Query(rate("baton_kv_transfer_seconds_count", MODEL, by="transport"), "{{transport}}"),),
            unit="ops",
            width=6,
        ),
        TimeSeries(
            title="Failures",
            description="By reason. checksum is serious: memory or a network corrupts bytes; the receiver counts it, "
            "and the sender the transfer that failed with it. Requests are tried again.",
            queries=(Query(rate("baton_kv_transfer_failures_total", MODEL, by="reason"), "{{reason}}"),),
            unit="ops",
            stacked=True,
            width=6,
        ),
        TimeSeries(
            title="Stale frames and fall-backs",
            description="Frames that came after their reservation was over (refused, harmless), and connections that "
            "could not use a transport although both ends offer it.",
            queries=(
                Query(rate("baton_kv_stale_frames_total", MODEL, by="worker"), "{{worker}} stale"),
                Query(rate("baton_kv_transport_fallbacks_total", MODEL, by="transport"), "not by {{transport}}"),
            ),
            unit="ops",
            width=6,
        ),
        TimeSeries(
            title="Reservations",
            description="Reservations that await or hold a transfer. It returns to 0 when nothing is going on.",
            queries=(Query(f'sum by (worker) (baton_kv_reservations{{role="decode", {MODEL}}})', "{{worker}}"),),
            unit="short",
            width=6,
        ),
    ),
)

TRANSFER = Dashboard(
    uid="baton-transfer",
    title="Baton / Transfer",
    description="KV between prefill and decode workers: pace, time, health.",
    rows=(_PACE, _WAIT, _HEALTH),
)
