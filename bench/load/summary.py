"""What was measured as tables of text, for the terminal and for pages."""

from __future__ import annotations

from collections.abc import Iterator

from bench.load.measurement import Measured
from bench.load.measures import Distribution, Measures
from bench.report import TableText


def summarize(measured: Measured) -> list[TableText]:
    """Latencies; then counts, throughput and, where there are objectives, goodput."""
    measures = measured.measures
    latencies = TableText(
        "Latencies, ms",
        ("", "mean", "p50", "p90", "p95", "p99", "max"),
        [
            _milliseconds("time to first token", measures.ttft),
            _milliseconds("inter-token latency", measures.itl),
            _milliseconds("time per output token", measures.tpot),
            _milliseconds("end to end", measures.latency),
            _milliseconds("sent late by", measures.lag),
        ],
    )
    return [latencies, TableText(measured.model.name, ("", "number", "each second"), list(_totals(measures)))]


def _totals(measures: Measures) -> Iterator[tuple[str, str, str]]:
    yield "requests", f"{measures.num_due}", ""
    yield "complete", f"{measures.num_completed}", f"{measures.requests_per_s:.2f}"
    yield "output tokens", f"{measures.output_tokens}", f"{measures.output_tokens_per_s:.1f}"
    yield "prompt tokens", f"{measures.input_tokens}", f"{measures.input_tokens_per_s:.1f}"
    yield "of them cached", f"{measures.cached_tokens}", ""
    if (goodput := measures.goodput) is not None:
        yield "within objectives", f"{goodput.attainment:.1%}", f"{goodput.requests_per_s:.2f}"
    for error, count in sorted(measures.errors.items()):
        yield f"ended by {error}", f"{count}", ""
    yield "duration, s", f"{measures.duration_s:.2f}", ""


def _milliseconds(name: str, of: Distribution) -> tuple[str, ...]:
    return name, *(f"{value * 1e3:.2f}" for value in (of.mean, of.p50, of.p90, of.p95, of.p99, of.max))
