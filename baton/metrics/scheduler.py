"""Series of one worker's engine loop and KV pool; both roles have all of them, some stay 0 in one of the two."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from baton.metrics import buckets
from baton.metrics.families import Families

WAITS = ("queue", "transfer", "local_prefill")
REFUSALS = ("blocks", "sequences")
KINDS = ("prefill", "decode")


class SchedulerMetrics:
    """Written by the engine thread alone."""

    def __init__(self, registry: CollectorRegistry) -> None:
        make = Families(registry)
        self._requests(make)
        self._cache(make)
        self._steps(make)

    def _requests(self, make: Families) -> None:
        self.running = make.gauge(
            "baton_worker_requests_running",
            "Prompts that are being computed (prefill worker), or sequences that are being decoded: one for each "
            "choice (decode worker).",
        )
        self.waiting = make.gauge(
            "baton_worker_requests_waiting",
            "Requests at the worker that do not run yet, by what they wait for: queue (prefill worker), the transfer "
            "of their KV, or their local prefill (decode worker).",
            reason=WAITS,
        )
        self.queued_tokens = make.gauge(
            "baton_worker_queued_tokens", "Prompt tokens that were accepted and are not computed yet."
        )
        self.queue_s = make.histogram(
            "baton_prefill_queue_seconds",
            "From a prompt's arrival at the prefill worker to its admission.",
            buckets.STAGE,
        )
        self.cancelled = make.counter("baton_worker_requests_cancelled", "Attempts cancelled by the router.")
        self.refused = make.counter(
            "baton_reservations_refused",
            "Reservations that a decode worker refused for the time being, by what it lacked.",
            reason=REFUSALS,
        )
        self.lease_expiries = make.counter(
            "baton_lease_expiries", "Leases that ran out because no router renewed them."
        )

    def _cache(self, make: Families) -> None:
        self.kv_usage = make.gauge(
            "baton_kv_cache_usage_ratio",
            "Share of the KV blocks that requests hold; blocks that are only cached are free.",
        )
        self.kv_blocks = make.gauge("baton_kv_cache_blocks", "KV blocks of the pool.")
        self.prefix_queries = make.counter(
            "baton_prefix_cache_queries",
            "Tokens of prompts looked up in this worker's prefix cache, once a request, when it is admitted; lookups "
            "of further attempts, and prompts that are computed whole to be scored, are left out.",
        )
        self.prefix_hits = make.counter(
            "baton_prefix_cache_hits",
            "Those of baton_prefix_cache_queries_total that were found. A request is looked up by both of its workers, "
            "so add up one role at a time.",
        )
        self.preemptions = make.counter("baton_preemptions", "Requests preempted for lack of blocks.")

    def _steps(self, make: Families) -> None:
        self.step_s = make.histogram("baton_step_seconds", "One step of the engine loop.", buckets.STEP)
        self.step_overhead_s = make.histogram(
            "baton_step_overhead_seconds",
            "What one step spends outside the model: planning, building the batch, sampling and publishing.",
            buckets.STEP_OVERHEAD,
        )
        self.step_tokens = make.histogram(
            "baton_step_tokens", "Tokens computed in one step, of all requests.", buckets.STEP_TOKENS
        )
        self.step_failures = make.counter(
            "baton_step_failures", "Steps that raised an error, which ended the requests that they were about."
        )
        self.computed_tokens = make.counter("baton_computed_tokens", "Tokens computed, by kind.", kind=KINDS)


def describe_cache(
    registry: CollectorRegistry, *, block_size: int, num_blocks: int, dtype: str, prefix_cache: bool, num_groups: int
) -> None:
    """Adds what an operator may want to know of a worker's KV pool, as labels of a constant."""
    Families(registry).constant(
        "baton_cache_config_info",
        "The worker's KV pool: tokens of a block, blocks, dtype, whether blocks are used again, and groups of layers "
        "with block tables of their own.",
        block_size=str(block_size),
        num_blocks=str(num_blocks),
        dtype=dtype,
        prefix_cache=str(prefix_cache).lower(),
        num_groups=str(num_groups),
    )
