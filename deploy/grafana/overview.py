"""What to look at first: is the service all right, what do users notice, and which part is to blame."""

from __future__ import annotations

from deploy.grafana.dashboard import Dashboard, Row
from deploy.grafana.panels import BarGauge, Query, Stat, Table, TimeSeries
from deploy.grafana.promql import MODEL, mean, rate

_TTFT_TARGET = Query(f'max(baton_slo_target_seconds{{objective="ttft", {MODEL}}})', "target")
_TPOT_TARGET = Query(f'max(baton_slo_target_seconds{{objective="tpot", {MODEL}}})', "target")
_BUDGET_COLOURS = ((1.0, "yellow"), (6.0, "orange"), (14.4, "red"))


def _quantiles(histogram: str) -> tuple[Query, ...]:
    return tuple(Query(f"max(model:{histogram}:{name}_rate5m{{{MODEL}}})", name) for name in ("p50", "p90", "p99"))


def _burn(ratio: str, budget: float) -> tuple[Query, ...]:
    """How many times faster than allowed the budget is used up, over several windows."""
    return tuple(
        Query(f"max(model:{ratio}:ratio_rate{window}{{{MODEL}}}) / {budget:g}", window)
        for window in ("5m", "30m", "1h", "6h")
    )


_NOW = Row(
    "Now",
    (
        Stat(
            title="Firing alerts",
            description="Alerts of Baton that fire. The runbook is docs/monitoring.md.",
            queries=(Query('count(ALERTS{alertname=~"Baton.+", alertstate="firing"}) or vector(0)', "alerts"),),
            unit="short",
            thresholds=((1, "red"),),
        ),
        Stat(
            title="Errors",
            description="Share of requests that failed, passed their deadline or were turned away, over 5 minutes. "
            "The objective is 0.1%.",
            queries=(Query(f"max(model:baton_request_errors:ratio_rate5m{{{MODEL}}})", "errors"),),
            unit="percentunit",
            decimals=2,
            thresholds=((0.001, "yellow"), (0.0144, "red")),
        ),
        Stat(
            title="Goodput",
            description="Share of requests that met both latency targets, over 5 minutes. The objective is 95%.",
            queries=(Query(f"min(model:baton_goodput_requests:ratio_rate5m{{{MODEL}}})", "within targets"),),
            unit="percentunit",
            base="red",
            thresholds=((0.7, "yellow"), (0.95, "green")),
        ),
        Stat(
            title="TTFT p99",
            description="Time to the first token that 99% of requests do not exceed, over 5 minutes.",
            queries=(Query(f"max(model:baton_time_to_first_token_seconds:p99_rate5m{{{MODEL}}})", "p99"),),
            unit="s",
            base="blue",
        ),
        Stat(
            title="Inter-token p99",
            description="Time between two tokens that 99% of them do not exceed, over 5 minutes.",
            queries=(Query(f"max(model:baton_inter_token_latency_seconds:p99_rate5m{{{MODEL}}})", "p99"),),
            unit="s",
            base="blue",
        ),
        Stat(
            title="Queued",
            description="Requests that wait in the router because no worker has room.",
            queries=(Query(f"sum(baton_requests_queued{{{MODEL}}})", "queued"),),
            unit="short",
            thresholds=((1, "yellow"), (100, "red")),
        ),
        Stat(
            title="Prefill workers",
            description="Prefill workers that the router is connected to.",
            queries=(Query(f'min(baton_workers{{worker_role="prefill", {MODEL}}})', "connected"),),
            unit="short",
            base="red",
            thresholds=((1, "green"),),
        ),
        Stat(
            title="Decode workers",
            description="Decode workers that the router is connected to.",
            queries=(Query(f'min(baton_workers{{worker_role="decode", {MODEL}}})', "connected"),),
            unit="short",
            base="red",
            thresholds=((1, "green"),),
        ),
    ),
)
_OBJECTIVES = Row(
    "Objectives: how fast each budget burns (1 uses it up exactly)",
    (
        TimeSeries(
            title="Errors (0.1%)",
            description="Failed requests over the 0.1% that may fail. Above 14.4 over an hour it alerts at once, "
            "above 6 over six hours for the working day.",
            queries=_burn("baton_request_errors", 0.001),
            unit="suffix:x",
            thresholds=_BUDGET_COLOURS,
        ),
        TimeSeries(
            title="First token too late (5%)",
            description="Requests whose first token came later than router.slo_ttft_s, over the 5% that may. Look at "
            "the stages below for where the time goes: queue and reserve mean too few decode workers, "
            "prefill too few prefill workers.",
            queries=_burn("baton_slo_ttft_misses", 0.05),
            unit="suffix:x",
            thresholds=_BUDGET_COLOURS[:2],
        ),
        TimeSeries(
            title="Tokens too slow (5%)",
            description="Requests whose tokens came slower on average than router.slo_tpot_s, over the 5% that may. "
            "Look at the decode dashboard.",
            queries=_burn("baton_slo_tpot_misses", 0.05),
            unit="suffix:x",
            thresholds=_BUDGET_COLOURS[:2],
        ),
    ),
)
_TRAFFIC = Row(
    "Traffic",
    (
        TimeSeries(
            title="Requests by outcome",
            description="Accepted requests that ended. stop and length are answers; cancelled is the client's choice.",
            queries=(Query(rate("baton_requests_total", MODEL, by="outcome"), "{{outcome}}"),),
            unit="reqps",
            stacked=True,
        ),
        TimeSeries(
            title="Requests turned away",
            description="Requests refused. resource_exhausted: the queue is full; unavailable: no worker; "
            "invalid_argument and the like are clients' mistakes.",
            queries=(Query(rate("baton_requests_rejected_total", MODEL, by="reason"), "{{reason}}"),),
            unit="reqps",
            stacked=True,
        ),
        TimeSeries(
            title="Tokens",
            description="Prompt tokens (those cached were computed by nobody) and tokens sent to clients.",
            queries=(
                Query(f"sum(rate(baton_prompt_tokens_total{{{MODEL}}}[$__rate_interval]))", "prompt"),
                Query(f"sum(rate(baton_prompt_tokens_cached_total{{{MODEL}}}[$__rate_interval]))", "prompt, cached"),
                Query(f"sum(rate(baton_generation_tokens_total{{{MODEL}}}[$__rate_interval]))", "generated"),
            ),
            unit="suffix: tok/s",
        ),
    ),
)
_LATENCY = Row(
    "What users wait for",
    (
        TimeSeries(
            title="Time to first token",
            description="From a request's arrival to its first token, over 5 minutes, with the router's target.",
            queries=(*_quantiles("baton_time_to_first_token_seconds"), _TTFT_TARGET),
            unit="s",
            dashed=("target",),
            width=6,
        ),
        TimeSeries(
            title="Between two tokens",
            description="Time between consecutive tokens, over 5 minutes. The p99 shows stalls that the mean over an "
            "answer hides.",
            queries=_quantiles("baton_inter_token_latency_seconds"),
            unit="s",
            width=6,
        ),
        TimeSeries(
            title="Time per output token",
            description="Mean time between tokens of each finished request, over 5 minutes, with the router's target.",
            queries=(*_quantiles("baton_request_time_per_output_token_seconds"), _TPOT_TARGET),
            unit="s",
            dashed=("target",),
            width=6,
        ),
        TimeSeries(
            title="Whole requests",
            description="From arrival to the end, over 5 minutes. Depends above all on how much clients ask for.",
            queries=_quantiles("baton_e2e_request_latency_seconds"),
            unit="s",
            width=6,
        ),
    ),
)
_WHERE = Row(
    "Where the time goes",
    (
        TimeSeries(
            title="Stages before the second token, mean",
            description="Mean time of finished requests in each stage. What grows is to blame: queue and reserve are "
            "decode workers without room, prefill is the prefill workers, transfer is KV that arrives "
            "after the prefill.",
            queries=(Query(mean("baton_request_stage_seconds", f'stage!="decode", {MODEL}', by="stage"), "{{stage}}"),),
            unit="s",
            stacked=True,
        ),
        TimeSeries(
            title="Workers' load",
            description="Share of time in which a worker's engine computes. A prefill worker near 1 makes first "
            "tokens late; a decode worker always computes while it has a stream.",
            queries=(Query(f"worker:baton_step_busy:ratio_rate5m{{{MODEL}}}", "{{worker}}"),),
            unit="percentunit",
            maximum=1,
        ),
        BarGauge(
            title="KV pools",
            description="Share of each worker's KV blocks that requests hold. A full decode pool makes requests wait, "
            "then preempts.",
            queries=(Query(f"max by (worker) (baton_kv_cache_usage_ratio{{{MODEL}}})", "{{worker}}"),),
            unit="percentunit",
            maximum=1,
            thresholds=((0.8, "yellow"), (0.95, "red")),
        ),
        Table(
            title="Workers",
            description="Everything that is scraped. Up 0 means that it is a member and does not answer.",
            labels={"worker": "Worker", "role": "Role", "instance": "Address"},
            queries=(
                Query('min by (worker, role, instance) (up{job="baton", model=~"$model"})', "Up"),
                Query(f"max by (worker, role, instance) (baton_worker_requests_running{{{MODEL}}})", "Running"),
                Query(f"sum by (worker, role, instance) (baton_worker_requests_waiting{{{MODEL}}})", "Waiting"),
                Query(f"max by (worker, role, instance) (baton_kv_cache_usage_ratio{{{MODEL}}})", "KV in use"),
                Query(f"max by (worker, role, instance) (process_resident_memory_bytes{{{MODEL}}})", "Memory"),
                Query(
                    f"time() - max by (worker, role, instance) (process_start_time_seconds{{{MODEL}}})",
                    "Running for",
                ),
            ),
            units={"KV in use": "percentunit", "Memory": "bytes", "Running for": "s"},
            unit="short",
        ),
    ),
)

OVERVIEW = Dashboard(
    uid="baton-overview",
    title="Baton / Overview",
    description="Objectives, traffic, latency, and where the time goes.",
    rows=(_NOW, _OBJECTIVES, _TRAFFIC, _LATENCY, _WHERE),
)
