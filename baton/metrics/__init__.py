"""Every Prometheus series of Baton, defined once.

A process makes one `CollectorRegistry` and the classes that it needs. What is the same for a whole process (worker,
role, model) is no label here: it comes with the scrape target. Base units throughout (seconds, bytes); buckets follow
vLLM's where users know them. docs/metrics.md is generated from here.
"""

from baton.metrics.frontend import GrpcMetrics, HttpMetrics
from baton.metrics.process import ProcessMetrics
from baton.metrics.router import ClusterMetrics, RouterMetrics
from baton.metrics.scheduler import SchedulerMetrics, describe_cache
from baton.metrics.transfer import TransferMetrics

__all__ = [
    "ClusterMetrics",
    "GrpcMetrics",
    "HttpMetrics",
    "ProcessMetrics",
    "RouterMetrics",
    "SchedulerMetrics",
    "TransferMetrics",
    "describe_cache",
]
