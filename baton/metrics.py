"""Every Prometheus series of Baton, defined once.

A process makes one `CollectorRegistry` and the classes that it needs. What is the same for a whole process (worker,
role, model) is not a label here: it comes with the scrape target. Base units throughout (seconds, bytes); buckets
follow vLLM's where users know them.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)  # fmt: skip
ITL_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
REQUEST_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
STAGE_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TRANSFER_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 5.0)
THROUGHPUT_BUCKETS = tuple(
    x * 1e9 for x in (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 25.0, 50.0, 100.0, 200.0, 400.0, 1000.0)
)
STEP_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5)
TOKEN_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
LENGTH_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class RouterMetrics:
    """Series of the router process: what clients experience."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "baton_requests",
            "Requests ended, by outcome: stop, length, cancelled, failed.",
            ["outcome"],
            registry=registry,
        )
        self.rejected = Counter(
            "baton_requests_rejected", "Requests refused, by reason.", ["reason"], registry=registry
        )
        self.running = Gauge("baton_requests_running", "Requests that hold a reservation.", registry=registry)
        self.queued = Gauge("baton_requests_queued", "Requests that wait for workers.", registry=registry)
        self.ttft_s = Histogram(
            "baton_time_to_first_token_seconds",
            "From arrival to the first token sent to the client.",
            registry=registry,
            buckets=TTFT_BUCKETS,
        )
        self.itl_s = Histogram(
            "baton_inter_token_latency_seconds",
            "Between two tokens of a choice.",
            registry=registry,
            buckets=ITL_BUCKETS,
        )
        self.e2e_s = Histogram(
            "baton_e2e_request_latency_seconds", "From arrival to the end.", registry=registry, buckets=REQUEST_BUCKETS
        )
        self.stage_s = Histogram(
            "baton_request_stage_seconds",
            "Time in each stage: queue, reserve, prefill, transfer (exposed part), first_decode_step, decode.",
            ["stage"],
            registry=registry,
            buckets=STAGE_BUCKETS,
        )
        self.prompt_tokens = Counter("baton_prompt_tokens", "Prompt tokens of accepted requests.", registry=registry)
        self.cached_tokens = Counter(
            "baton_prompt_tokens_cached", "Prompt tokens that no worker computed.", registry=registry
        )
        self.generation_tokens = Counter("baton_generation_tokens", "Tokens sent to clients.", registry=registry)
        self.request_prompt_tokens = Histogram(
            "baton_request_prompt_tokens", "Prompt tokens of a request.", registry=registry, buckets=LENGTH_BUCKETS
        )
        self.request_generation_tokens = Histogram(
            "baton_request_generation_tokens",
            "Tokens generated for a request.",
            registry=registry,
            buckets=LENGTH_BUCKETS,
        )
        self.prefill_decisions = Counter(
            "baton_prefill_decisions",
            "Where prompts were prefilled: remote, local_short, local_cached, local_no_prefill_worker.",
            ["decision"],
            registry=registry,
        )
        self.retries = Counter("baton_request_retries", "New attempts, by reason.", ["reason"], registry=registry)
        self.workers = Gauge("baton_workers", "Workers that the router is connected to.", ["role"], registry=registry)


class SchedulerMetrics:
    """Series of one worker's engine loop and KV pool."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.running = Gauge("baton_worker_requests_running", "Sequences in the running set.", registry=registry)
        self.waiting = Gauge(
            "baton_worker_requests_waiting", "Sequences that wait for the scheduler.", registry=registry
        )
        self.kv_usage = Gauge("baton_kv_cache_usage_ratio", "Share of KV blocks in use.", registry=registry)
        self.kv_blocks = Gauge("baton_kv_cache_blocks", "KV blocks of the pool.", registry=registry)
        self.prefix_queries = Counter(
            "baton_prefix_cache_queries", "Prompt tokens looked up, once a request.", registry=registry
        )
        self.prefix_hits = Counter("baton_prefix_cache_hits", "Prompt tokens found.", registry=registry)
        self.preemptions = Counter("baton_preemptions", "Sequences preempted for lack of blocks.", registry=registry)
        self.cancelled = Counter(
            "baton_worker_requests_cancelled", "Requests cancelled by the router.", registry=registry
        )
        self.lease_expiries = Counter("baton_lease_expiries", "Leases that ran out.", registry=registry)
        self.step_s = Histogram(
            "baton_step_seconds", "One step of the engine loop.", registry=registry, buckets=STEP_BUCKETS
        )
        self.step_tokens = Histogram(
            "baton_step_tokens", "Tokens computed in one step.", registry=registry, buckets=TOKEN_BUCKETS
        )
        self.computed_tokens = Counter(
            "baton_computed_tokens", "Tokens computed, by kind: prefill or decode.", ["kind"], registry=registry
        )


class TransferMetrics:
    """Series of KV transfers, of a sender or a receiver."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.sent_bytes = Counter("baton_kv_sent_bytes", "KV bytes sent.", ["transport"], registry=registry)
        self.received_bytes = Counter(
            "baton_kv_received_bytes", "KV bytes copied in and verified.", ["transport"], registry=registry
        )
        self.transfer_s = Histogram(
            "baton_kv_transfer_seconds",
            "From Open to the answer of Commit, as the sender sees it.",
            ["transport"],
            registry=registry,
            buckets=TRANSFER_BUCKETS,
        )
        self.throughput = Histogram(
            "baton_kv_transfer_bytes_per_second",
            "Bytes of a transfer over the time that its frames were under way.",
            ["transport"],
            registry=registry,
            buckets=THROUGHPUT_BUCKETS,
        )
        self.failures = Counter(
            "baton_kv_transfer_failures", "Transfers that failed, by reason.", ["reason"], registry=registry
        )
        self.stale_frames = Counter(
            "baton_kv_stale_frames", "Frames refused because their reservation was over.", registry=registry
        )
        self.reservations = Gauge("baton_kv_reservations", "Reservations held.", registry=registry)
