"""What `baton bench router` found: as JSON, as tables and as a plot, beside what it should be."""

from __future__ import annotations

import dataclasses
import statistics
from typing import TYPE_CHECKING, Any

from bench.report import TableText
from bench.router.measurements import Latencies, Serving, Streaming

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AIM_ADDED_TTFT_MS = 2.0
AIM_SSE_US_PER_TOKEN = 60.0
AIM_GRPC_OVER_BARE = 1.3


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """All results; the names of the dictionaries are `direct`, `bare`, `grpc` and `sse`.

    Attributes:
        streaming: of each protocol, its rounds.
        saturated: of each protocol, requests as fast as the router answers them.
        points: after each tenth of a long run over both protocols.
    """

    ttft: dict[str, Latencies]
    streaming: dict[str, list[Streaming]]
    saturated: dict[str, Serving]
    points: list[Serving]

    def cpu_us_per_token(self, name: str) -> float:
        """The median of the rounds."""
        return statistics.median(each.cpu_us_per_token for each in self.streaming[name])

    def to_json(self) -> dict[str, Any]:
        """Plain values, with what the aims are about beside what was measured."""
        first, last = self.points[0], self.points[-1]
        return {
            "ttft": {name: dataclasses.asdict(each) for name, each in self.ttft.items()},
            "added_ttft_ms": {
                name: each.p50_ms - self.ttft["direct"].p50_ms for name, each in self.ttft.items() if name != "direct"
            },
            "streaming": {
                name: [dataclasses.asdict(each) for each in rounds] for name, rounds in self.streaming.items()
            },
            "cpu_us_per_token": {name: self.cpu_us_per_token(name) for name in self.streaming},
            "grpc_over_bare": self.cpu_us_per_token("grpc") / self.cpu_us_per_token("bare"),
            "saturated": {name: dataclasses.asdict(each) for name, each in self.saturated.items()},
            "points": [dataclasses.asdict(each) for each in self.points],
            "rss_growth_bytes": last.rss_bytes - first.rss_bytes,
            "cpu_per_request_last_over_first": last.cpu_ms_per_request / first.cpu_ms_per_request,
        }

    def tables(self) -> list[TableText]:
        """For the terminal."""
        return [self._ttft_table(), self._streaming_table(), self._serving_table()]

    def draw(self, *, title: str) -> Figure:
        """CPU for each token, a dot for each round; and memory over the long run."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4), layout="constrained")
        figure.suptitle(title)
        cpu, memory = figure.subplots(1, 2)
        for place, (name, rounds) in enumerate(self.streaming.items()):
            cpu.barh(name, self.cpu_us_per_token(name), alpha=0.35)
            cpu.plot(
                [each.cpu_us_per_token for each in rounds], [place] * len(rounds), "o", color="black", markersize=4
            )
        cpu.set_xlabel("CPU for each token, µs")
        num_requests = [sum(each.num_requests for each in self.points[: last + 1]) for last in range(len(self.points))]
        memory.plot(num_requests, [each.rss_bytes / (1 << 20) for each in self.points], "o-")
        memory.set_xlabel("requests served")
        memory.set_ylabel("resident memory, MiB")
        memory.set_ylim(bottom=0)
        return figure

    def _ttft_table(self) -> TableText:
        direct_ms = self.ttft["direct"].p50_ms
        rows = []
        for name, each in self.ttft.items():
            added_ms = each.p50_ms - direct_ms
            cells = (name, f"{each.p50_ms:.2f}", f"{each.p99_ms:.2f}")
            if name == "direct":
                rows.append((*cells, "", "", ""))
            else:
                aim = AIM_ADDED_TTFT_MS
                rows.append((*cells, f"{added_ms:.2f}", f"<= {aim:g}", _verdict(added_ms <= aim)))
        return TableText(
            "Time to first token, one request at a time, ms", ("", "p50", "p99", "added p50", "aim", ""), rows
        )

    def _streaming_table(self) -> TableText:
        bare_us = self.cpu_us_per_token("bare")
        rows = []
        for name, rounds in self.streaming.items():
            us = self.cpu_us_per_token(name)
            aim, verdict = "", ""
            if name == "grpc":
                aim, verdict = f"<= {AIM_GRPC_OVER_BARE:g} of bare", _verdict(us <= AIM_GRPC_OVER_BARE * bare_us)
            elif name == "sse":
                aim, verdict = f"<= {AIM_SSE_US_PER_TOKEN:g} µs", _verdict(us <= AIM_SSE_US_PER_TOKEN)
            together = statistics.median(each.messages_per_token for each in rounds)
            load = statistics.median(each.load for each in rounds)
            rows.append((name, f"{us:.1f}", f"{us / bare_us:.2f}", f"{together:.2f}", f"{load:.0%}", aim, verdict))
        columns = ("", "µs", "of bare", "messages/token", "of a core", "aim", "")
        return TableText("Server CPU for each token of streams at a time, medians of the rounds", columns, rows)

    def _serving_table(self) -> TableText:
        runs = [*self.saturated.items(), *((str(index), each) for index, each in enumerate(self.points, start=1))]
        return TableText(
            "Requests as fast as they are answered; numbered: one after the other, over both",
            ("", "requests", "a second", "tokens/s", "CPU ms each", "µs/token", "of a core", "RSS MiB"),
            [
                (
                    name,
                    str(each.num_requests),
                    f"{each.requests_per_s:.0f}",
                    f"{each.tokens_per_s:.0f}",
                    f"{each.cpu_ms_per_request:.2f}",
                    f"{each.cpu_us_per_token:.0f}",
                    f"{each.load:.0%}",
                    f"{each.rss_bytes / (1 << 20):.1f}",
                )
                for name, each in runs
            ],
        )


def _verdict(is_met: bool) -> str:
    return "pass" if is_met else "miss"
