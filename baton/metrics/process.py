"""Series that every process has, whatever it does."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)

import baton
from baton.metrics.families import Families


class ProcessMetrics:
    """The version, and what prometheus_client knows of a process: memory, CPU, files, garbage, Python."""

    def __init__(self, registry: CollectorRegistry) -> None:
        # A `_created` series for every counter and bucket set says little and costs a third of each scrape.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        Families(registry).constant("baton_build_info", "The version that the process runs.", version=baton.__version__)
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
