"""Series of KV transfers: a prefill worker's as the sender, a decode worker's as the receiver."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from baton.errors import BatonError
from baton.metrics import buckets
from baton.metrics.families import Families, statuses

TRANSPORTS = ("loopback", "cuda_ipc", "shm", "collective", "grpc")
REASONS = ("checksum", *sorted({*statuses(BatonError)}))


class TransferMetrics:
    """Written by the links' threads and the data plane's."""

    def __init__(self, registry: CollectorRegistry) -> None:
        make = Families(registry)
        self.sent_bytes = make.counter("baton_kv_sent_bytes", "KV bytes sent.", transport=TRANSPORTS)
        self.received_bytes = make.counter(
            "baton_kv_received_bytes", "KV bytes copied in and verified.", transport=TRANSPORTS
        )
        self.transfer_s = make.histogram(
            "baton_kv_transfer_seconds",
            "From Open to the answer of Commit, as the sender sees it; most of it lies beside the prefill. Between "
            "workers of several ranks there is one transfer for each two ranks that have heads in common.",
            buckets.TRANSFER,
            transport=TRANSPORTS,
        )
        self.transfer_bytes = make.histogram(
            "baton_kv_transfer_bytes", "KV bytes of a transfer.", buckets.TRANSFER_BYTES, transport=TRANSPORTS
        )
        self.throughput = make.histogram(
            "baton_kv_transfer_bytes_per_second",
            "Bytes of a transfer over the time from its first frame to the answer of Commit. The frames follow the "
            "prefill's layers, so this is the pace of the slower of the two.",
            buckets.BYTES_PER_SECOND,
            transport=TRANSPORTS,
        )
        self.failures = make.counter(
            "baton_kv_transfer_failures",
            "At a prefill worker transfers that failed, by status; those that it gave up itself are not among them. "
            "At a decode worker frames whose bytes did not verify (checksum); their transfer fails at the sender as "
            "well.",
            reason=REASONS,
        )
        self.fallbacks = make.counter(
            "baton_kv_transport_fallbacks",
            "Connections that could not use this transport although both ends offer it, and took the next one.",
            transport=TRANSPORTS,
        )
        self.stale_frames = make.counter(
            "baton_kv_stale_frames",
            "Frames refused because their reservation was over or their sender had taken them back; they did no harm.",
        )
        self.reservations = make.gauge("baton_kv_reservations", "Reservations that await or hold a transfer.")
