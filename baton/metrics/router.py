"""Series of the router process: what clients experience, and what the router sees of its workers."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from baton.errors import (
    DuplicateRequestError,
    InternalError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    UnavailableError,
)
from baton.metrics import buckets
from baton.metrics.families import Families

OUTCOMES = ("stop", "length", "cancelled", "deadline", "failed")
_REFUSALS = (
    DuplicateRequestError,
    InternalError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    UnavailableError,
)
REASONS = tuple(error.status.lower() for error in _REFUSALS)
STAGES = ("intake", "queue", "reserve", "prefill", "transfer", "first_decode_step", "decode")
DECISIONS = ("remote", "local_short", "local_cached", "local_backlog", "local_no_prefill_worker")
FAILURES = (
    "refused",
    "preempted",
    "reserve_failed",
    "prefill_failed",
    "decode_lost",
    "lease_lost",
    "decode_failed",
)
SOURCES = ("kv_transfer", "local_cache_hit", "local_compute")
VERDICTS = ("met", "missed")
OBJECTIVES = ("ttft", "tpot")
ROLES = ("prefill", "decode")


class RouterMetrics:
    """Requests, from arrival to their end."""

    def __init__(self, registry: CollectorRegistry) -> None:
        make = Families(registry)
        self._outcomes(make)
        self._latencies(make)
        self._tokens(make)

    def _outcomes(self, make: Families) -> None:
        self.requests = make.counter(
            "baton_requests",
            "Requests that ended, by outcome. deadline (the client's own) and cancelled count whether or not the "
            "request had been accepted by then; refused ones are not among them.",
            outcome=OUTCOMES,
        )
        self.rejected = make.counter(
            "baton_requests_rejected",
            "Requests that the router refused, by reason: the gRPC status. invalid_argument, not_found and "
            "already_exists are the client's doing. Calls that an API turns away before they are "
            "requests (no valid key, a body or parameter that it cannot read) are in baton_http_requests_total or "
            "baton_grpc_calls_total alone.",
            reason=REASONS,
        )
        self.running = make.gauge("baton_requests_running", "Requests that hold a reservation.")
        self.queued = make.gauge("baton_requests_queued", "Requests that wait for workers.")
        self.decisions = make.counter(
            "baton_prefill_decisions",
            "Attempts placed, by who prefills and why: a prefill worker, or the decode worker because little is "
            "lacking (short), the rest is cached, the prefill workers would take longer (backlog), or none is there.",
            decision=DECISIONS,
        )
        self.retries = make.counter(
            "baton_request_retries",
            "Attempts that ended early and were followed by another, by reason.",
            reason=FAILURES,
        )
        self.migrations = make.counter(
            "baton_request_migrations", "Streams that went on at another decode worker after their first token."
        )
        self.slo_requests = make.counter(
            "baton_slo_requests",
            "Accepted requests by whether their time to first token and their time per output token were within the "
            "router's targets. One that ended before its first token counts where it had waited for longer than that.",
            ttft=VERDICTS,
            tpot=VERDICTS,
        )
        self.slo_targets = make.gauge(
            "baton_slo_target_seconds", "The targets of baton_slo_requests_total.", objective=OBJECTIVES
        )

    def _latencies(self, make: Families) -> None:
        self.ttft_s = make.histogram(
            "baton_time_to_first_token_seconds",
            "From arrival to the first token sent to the client.",
            buckets.TTFT,
        )
        self.itl_s = make.single_writer_histogram(
            "baton_inter_token_latency_seconds",
            "Between two tokens of a choice; tokens that leave in one message share the time since the one before.",
            buckets.INTER_TOKEN,
        )
        self.tpot_s = make.histogram(
            "baton_request_time_per_output_token_seconds",
            "Of a finished request, the mean time between two tokens of a choice.",
            buckets.INTER_TOKEN,
        )
        self.e2e_s = make.histogram(
            "baton_e2e_request_latency_seconds", "From arrival to the end of a finished request.", buckets.REQUEST
        )
        self.stage_s = make.histogram(
            "baton_request_stage_seconds",
            "Time in each stage of a finished request's last attempt. intake is checking, tokenising and hashing, "
            "prefill is from arrival at the worker that prefills, transfer is the exposed part: from the end of "
            "prefill to the decode worker's commit.",
            buckets.STAGE,
            stage=STAGES,
        )

    def _tokens(self, make: Families) -> None:
        self.prompt_tokens = make.counter(
            "baton_prompt_tokens", "Prompt tokens, counted once a request, with its first token."
        )
        self.cached_tokens = make.counter(
            "baton_prompt_tokens_cached",
            "Those of baton_prompt_tokens_total that no worker computed. The ratio of the two is the service's prefix "
            "cache hit ratio: neither retries nor the second worker's lookup count twice.",
        )
        self.prompt_tokens_by_source = make.counter(
            "baton_prompt_tokens_by_source",
            "Where the decode worker had the KV of prompt tokens from: a prefill worker, its own cache, or its own "
            "computation.",
            source=SOURCES,
        )
        self.generation_tokens = make.single_writer_counter("baton_generation_tokens", "Tokens sent to clients.")
        self.request_prompt_tokens = make.histogram(
            "baton_request_prompt_tokens", "Prompt tokens of an accepted request.", buckets.LENGTH
        )
        self.request_computed_tokens = make.histogram(
            "baton_request_prefill_computed_tokens",
            "Prompt tokens of a request that were computed for it.",
            buckets.LENGTH,
        )
        self.request_generation_tokens = make.histogram(
            "baton_request_generation_tokens", "Tokens generated for a finished request.", buckets.LENGTH
        )
        self.request_max_tokens = make.histogram(
            "baton_request_params_max_tokens",
            "max_tokens of an accepted request, its default resolved.",
            buckets.LENGTH,
        )
        self.request_n = make.histogram("baton_request_params_n", "n of an accepted request.", buckets.CHOICES)


class ClusterMetrics:
    """Workers as the router sees them. `worker_role`, since `role` is a label of the scrape target."""

    def __init__(self, registry: CollectorRegistry) -> None:
        make = Families(registry)
        self.workers = make.gauge(
            "baton_workers", "Workers to which all of the router's streams are up.", worker_role=ROLES
        )
        self.joins = make.counter(
            "baton_worker_joins", "Worker incarnations that became members of the cluster.", worker_role=ROLES
        )
        self.departures = make.counter(
            "baton_worker_departures",
            "Worker incarnations that ceased to be members: died, or were stopped.",
            worker_role=ROLES,
        )
