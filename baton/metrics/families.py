"""Makes the families of one registry, each with all the label values that are known beforehand.

A series that is there from the start, at 0, is what makes `rate()` right for the first event and a dashboard tell
"none" from "no data".
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.samples import Sample


class SingleWriterHistogram(Histogram):
    """For what one thread observes thousands of times a second: no locks, and the bucket by bisection."""

    def _metric_init(self) -> None:
        super()._metric_init()
        self._counts = [0] * len(self._upper_bounds)
        self._total = 0.0

    def observe(self, amount: float, exemplar: dict[str, str] | None = None) -> None:
        assert exemplar is None, "not kept"
        self._counts[bisect.bisect_left(self._upper_bounds, amount)] += 1
        self._total += amount

    def _child_samples(self) -> Iterable[Sample]:
        for bucket, count in zip(self._buckets, self._counts, strict=True):
            bucket.set(count)
        self._sum.set(self._total)
        return super()._child_samples()


class SingleWriterCounter(Counter):
    """As `SingleWriterHistogram`."""

    def _metric_init(self) -> None:
        super()._metric_init()
        self._count = 0.0

    def inc(self, amount: float = 1, exemplar: dict[str, str] | None = None) -> None:
        assert exemplar is None, "not kept"
        self._count += amount

    def _child_samples(self) -> Iterable[Sample]:
        self._value.set(self._count)
        return super()._child_samples()


class Families:
    """
    Args of all methods:
        name: without the suffixes that the exposition adds, such as `_total`.
        text: what is counted, as it stands in /metrics and in docs/metrics.md.
        labels: for each label its values; empty where they are not known beforehand, yet bounded.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def counter(self, name: str, text: str, **labels: Iterable[str]) -> Counter:
        counter = Counter(name, text, list(labels), registry=self._registry)
        _initialise(counter, labels.values())
        return counter

    def gauge(self, name: str, text: str, **labels: Iterable[str]) -> Gauge:
        gauge = Gauge(name, text, list(labels), registry=self._registry)
        _initialise(gauge, labels.values())
        return gauge

    def histogram(self, name: str, text: str, buckets: Sequence[float], **labels: Iterable[str]) -> Histogram:
        histogram = Histogram(name, text, list(labels), registry=self._registry, buckets=buckets)
        _initialise(histogram, labels.values())
        return histogram

    def single_writer_histogram(self, name: str, text: str, buckets: Sequence[float]) -> SingleWriterHistogram:
        return SingleWriterHistogram(name, text, registry=self._registry, buckets=buckets)

    def single_writer_counter(self, name: str, text: str) -> SingleWriterCounter:
        return SingleWriterCounter(name, text, registry=self._registry)

    def constant(self, name: str, text: str, **labels: str) -> None:
        """A gauge of value 1 that only carries labels."""
        self.gauge(name, text, **{label: [value] for label, value in labels.items()}).labels(**labels).set(1)


def statuses(error: type[Exception]) -> Iterator[str]:
    """Values of labels that name how something failed: the statuses of an error and of all that derive from it."""
    status = getattr(error, "status", None)
    if status is not None:
        yield status.lower()
    for kind in error.__subclasses__():
        yield from statuses(kind)


def _initialise(metric: MetricWrapperBase, values: Iterable[Iterable[str]]) -> None:
    for combination in itertools.product(*values):
        if combination:
            metric.labels(*combination)
