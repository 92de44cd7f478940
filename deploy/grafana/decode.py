"""Decode workers: the pace of streams, room for more of them, and what disturbs them."""

from __future__ import annotations

from deploy.grafana import promql, workers
from deploy.grafana.dashboard import Dashboard, Row
from deploy.grafana.panels import Heatmap, Query, TimeSeries
from deploy.grafana.promql import MODEL, buckets, rate

_WHERE = promql.DECODE

_STREAMS = Row(
    "Streams",
    (
        TimeSeries(
            title="Running sequences",
            description="Sequences that are being decoded, one for each choice.",
            queries=(Query(f"sum by (worker) (baton_worker_requests_running{{{_WHERE}}})", "{{worker}}"),),
            unit="short",
            width=6,
        ),
        TimeSeries(
            title="Requests that hold blocks and do not run yet",
            description="By what they wait for: their KV from a prefill worker, or their local prefill.",
            queries=(
                Query(
                    f'sum by (worker, reason) (baton_worker_requests_waiting{{reason!="queue", {_WHERE}}})',
                    "{{worker}} {{reason}}",
                ),
            ),
            unit="short",
            width=6,
        ),
        TimeSeries(
            title="Tokens computed",
            description="Decoded tokens, and prompt tokens that decode workers prefilled themselves.",
            queries=(Query(rate("baton_computed_tokens_total", _WHERE, by="worker, kind"), "{{worker}} {{kind}}"),),
            unit="suffix: tok/s",
            width=6,
        ),
        Heatmap(
            title="Between two tokens (all workers)",
            description="As clients see it. A second band far above the first is a stall that all streams of a worker "
            "share.",
            queries=(Query(buckets("baton_inter_token_latency_seconds", MODEL), "{{le}}"),),
            unit="s",
            width=6,
        ),
    ),
)
_ROOM = Row(
    "Room",
    (
        TimeSeries(
            title="Preemptions",
            description="Requests that gave their blocks back and are recomputed. More than now and then: the pool is "
            "too small for the load.",
            queries=(Query(rate("baton_preemptions_total", _WHERE, by="worker"), "{{worker}}"),),
            unit="ops",
        ),
        TimeSeries(
            title="Reservations refused",
            description="By what was lacking: blocks, or sequences of the batch (decode.max_batch_seqs). The router "
            "asks again when something was freed.",
            queries=(
                Query(rate("baton_reservations_refused_total", _WHERE, by="worker, reason"), "{{worker}} {{reason}}"),
            ),
            unit="ops",
        ),
        TimeSeries(
            title="Prompts' KV by source",
            description="Prompt tokens by where the decode workers had their KV from, as the router counts them.",
            queries=(Query(rate("baton_prompt_tokens_by_source_total", MODEL, by="source"), "{{source}}"),),
            unit="suffix: tok/s",
            stacked=True,
        ),
    ),
)

DECODE = Dashboard(
    uid="baton-decode",
    title="Baton / Decode",
    description="Decode workers: streams, room, batches, caches.",
    worker_role="decode",
    rows=(_STREAMS, _ROOM, workers.steps(_WHERE), workers.cache(_WHERE), workers.ends(_WHERE)),
)
