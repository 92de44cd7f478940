"""The router: its queue and decisions, what goes wrong and is mended, the stages, both APIs, and the process."""

from __future__ import annotations

from deploy.grafana.dashboard import Dashboard, Row
from deploy.grafana.panels import Heatmap, Query, TimeSeries
from deploy.grafana.promql import MODEL, buckets, quantile, rate, share

_PROCESS = f'role="router", {MODEL}'

_QUEUE = Row(
    "Queue and placement",
    (
        TimeSeries(
            title="Requests in the router",
            description="Queued requests wait for room on a worker; running ones hold a reservation. A queue that "
            "does not drain means that decode workers are full or prefill workers have no credit left.",
            queries=(
                Query(f"sum(baton_requests_queued{{{MODEL}}})", "queued"),
                Query(f"sum(baton_requests_running{{{MODEL}}})", "running"),
            ),
            unit="short",
        ),
        TimeSeries(
            title="Who prefills",
            description="Attempts by decision. local_no_prefill_worker should be 0: it slows everybody's stream.",
            queries=(Query(rate("baton_prefill_decisions_total", MODEL, by="decision"), "{{decision}}"),),
            unit="ops",
            stacked=True,
        ),
        TimeSeries(
            title="Workers connected",
            description="Workers to which all streams are up.",
            queries=(Query(f"sum by (worker_role) (baton_workers{{{MODEL}}})", "{{worker_role}}"),),
            unit="short",
            decimals=0,
        ),
    ),
)
_RECOVERY = Row(
    "What went wrong and was mended",
    (
        TimeSeries(
            title="Attempts that were followed by another",
            description="refused and preempted are everyday life under load; the others are workers that died, hung "
            "or lost a transfer.",
            queries=(Query(rate("baton_request_retries_total", MODEL, by="reason"), "{{reason}}"),),
            unit="ops",
            stacked=True,
        ),
        TimeSeries(
            title="Workers that left and joined",
            description="Incarnations. One that dies is replaced within seconds.",
            queries=(
                Query(
                    f"sum by (worker_role) (increase(baton_worker_departures_total{{{MODEL}}}[$__rate_interval]))",
                    "{{worker_role}} left",
                ),
                Query(
                    f"sum by (worker_role) (increase(baton_worker_joins_total{{{MODEL}}}[$__rate_interval]))",
                    "{{worker_role}} joined",
                ),
            ),
            unit="short",
        ),
        TimeSeries(
            title="Streams that moved",
            description="Streams that went on at another decode worker after their first token.",
            queries=(Query(rate("baton_request_migrations_total", MODEL), "{{model}}"),),
            unit="ops",
        ),
    ),
)
_STAGES = Row(
    "Stages of finished requests",
    (
        TimeSeries(
            title="Before and beside the workers, p99",
            description="intake is checking, tokenising and hashing; queue is waiting for room; reserve is one call "
            "to the decode worker.",
            queries=(
                Query(
                    quantile(
                        0.99, "baton_request_stage_seconds", f'stage=~"intake|queue|reserve", {MODEL}', by="stage"
                    ),
                    "{{stage}}",
                ),
            ),
            unit="s",
        ),
        TimeSeries(
            title="At the workers, p99",
            description="prefill is from arrival at the worker that prefills; transfer is what remains to be sent "
            "after it.",
            queries=(
                Query(
                    quantile(
                        0.99,
                        "baton_request_stage_seconds",
                        f'stage=~"prefill|transfer|first_decode_step", {MODEL}',
                        by="stage",
                    ),
                    "{{stage}}",
                ),
            ),
            unit="s",
        ),
        Heatmap(
            title="Time to first token",
            description="How the times to the first token are spread. Two bands often mean cached and uncached "
            "prompts.",
            queries=(Query(buckets("baton_time_to_first_token_seconds", MODEL), "{{le}}"),),
            unit="s",
        ),
    ),
)
_PROMPTS = Row(
    "Prompts and answers",
    (
        TimeSeries(
            title="Where prompts' KV came from",
            description="Prompt tokens by where the decode worker had their KV from, counted once a request.",
            queries=(Query(rate("baton_prompt_tokens_by_source_total", MODEL, by="source"), "{{source}}"),),
            unit="suffix: tok/s",
            stacked=True,
        ),
        TimeSeries(
            title="Prefix cache hit ratio",
            description="Share of prompt tokens that nobody computed, counted once a request.",
            queries=(
                Query(
                    share("baton_prompt_tokens_cached_total", MODEL, "baton_prompt_tokens_total", MODEL), "{{model}}"
                ),
            ),
            unit="percentunit",
            maximum=1,
        ),
        TimeSeries(
            title="Lengths, median",
            description="What requests bring, ask for and get. max_tokens far above what is generated makes no harm: "
            "blocks are taken as they are needed.",
            queries=(
                Query(quantile(0.5, "baton_request_prompt_tokens", MODEL), "prompt"),
                Query(quantile(0.5, "baton_request_prefill_computed_tokens", MODEL), "prompt, computed"),
                Query(quantile(0.5, "baton_request_generation_tokens", MODEL), "generated"),
                Query(quantile(0.5, "baton_request_params_max_tokens", MODEL), "max_tokens"),
                Query(quantile(0.5, "baton_request_params_n", MODEL), "n"),
            ),
            unit="short",
        ),
    ),
)
_APIS = Row(
    "APIs",
    (
        TimeSeries(
            title="HTTP calls",
            description="Calls that ended, by route and status; 499 means that the client hung up.",
            queries=(Query(rate("baton_http_requests_total", MODEL, by="route, status"), "{{route}} {{status}}"),),
            unit="reqps",
            width=6,
        ),
        TimeSeries(
            title="HTTP durations, p99",
            description="From a call's arrival to the last byte, streams included.",
            queries=(Query(quantile(0.99, "baton_http_request_duration_seconds", MODEL, by="route"), "{{route}}"),),
            unit="s",
            width=6,
        ),
        TimeSeries(
            title="gRPC calls",
            description="Calls that ended, by method and status.",
            queries=(Query(rate("baton_grpc_calls_total", MODEL, by="method, status"), "{{method}} {{status}}"),),
            unit="reqps",
            width=6,
        ),
        TimeSeries(
            title="Calls under way",
            description="Open HTTP and gRPC calls.",
            queries=(
                Query(f"sum(baton_http_requests_in_flight{{{MODEL}}})", "HTTP"),
                Query(f"sum(baton_grpc_calls_in_flight{{{MODEL}}})", "gRPC"),
            ),
            unit="short",
            width=6,
        ),
    ),
)
_ROUTER = Row(
    "Process",
    (
        TimeSeries(
            title="CPU",
            description="The router is one event loop: near 1 core it delays every stream, and part of the "
            "traffic needs a cluster of its own.",
            queries=(
                Query(
                    f"sum by (instance) (rate(process_cpu_seconds_total{{{_PROCESS}}}[$__rate_interval]))",
                    "{{instance}}",
                ),
            ),
            unit="suffix: cores",
            thresholds=((0.8, "yellow"), (0.95, "red")),
        ),
        TimeSeries(
            title="Memory",
            description="Resident memory.",
            queries=(Query(f"max by (instance) (process_resident_memory_bytes{{{_PROCESS}}})", "{{instance}}"),),
            unit="bytes",
        ),
        TimeSeries(
            title="Open files",
            description="Sockets and files; each streaming client has one.",
            queries=(Query(f"max by (instance) (process_open_fds{{{_PROCESS}}})", "{{instance}}"),),
            unit="short",
        ),
    ),
)

ROUTER = Dashboard(
    uid="baton-router",
    title="Baton / Router",
    description="Queue, placement, recovery, stages and APIs.",
    rows=(_QUEUE, _RECOVERY, _STAGES, _PROMPTS, _APIS, _ROUTER),
)
