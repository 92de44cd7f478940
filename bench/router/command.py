"""`baton bench router`: measures, prints tables, and writes a report."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any, Self

import click
import uvloop

from bench import report
from bench.plots import write_plot
from bench.provenance import Provenance
from bench.router.clients import BareClient, GrpcClient, SseClient, StreamClient
from bench.router.measurements import (
    DirectWorkers,
    Latencies,
    Prompts,
    Serving,
    Streaming,
    measure_serving,
    measure_streaming,
    ttft_s,
)
from bench.router.processes import Addresses, Child, running, running_router
from bench.router.results import Measured

# What the router streams for a token over gRPC.
_MESSAGE_BYTES = 64
# As long as a quick engine's, so that a step has the tokens of many requests.
_BUSY_STEP_S = 0.005
# Requests that open connections and fill caches before latencies count.
_NUM_WARM_UPS = 10
_NUM_POINTS = 10


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is measured with; see the command's options."""

    num_streams: int
    num_tokens: int
    step_ms: float
    rounds: int
    num_latencies: int
    num_requests: int
    tokens_per_request: int


@dataclasses.dataclass(frozen=True, slots=True)
class Bench:
    """The processes that are measured, and how they are asked."""

    router: Child
    bare: Child
    workers: Child
    clients: dict[str, StreamClient]
    direct: DirectWorkers
    prompts: Iterator[str]

    @classmethod
    def open(cls, *, router: Child, addresses: Addresses, bare: Child, workers: Child, told: dict[str, str]) -> Self:
        """Opens connections; on the event loop that will use them.

        Args:
            told: where the mock workers are, as their process says.
        """
        clients: dict[str, StreamClient] = {
            "bare": BareClient(bare.read_line()),
            "grpc": GrpcClient(addresses.grpc),
            "sse": SseClient(addresses.http),
        }
        direct = DirectWorkers(told["prefill"], told["decode"])
        return cls(router, bare, workers, clients, direct, iter(Prompts()))

    async def measure(self, load: Load) -> Measured:
        """Everything, one after the other."""
        try:
            self.pace(0.0)
            ttft = await self._measure_ttft(load)
            self.pace(load.step_ms / 1e3)
            streaming = await self._measure_streaming(load)
            self.pace(_BUSY_STEP_S)
            num_requests = max(load.num_requests // _NUM_POINTS, 1)
            saturated = {name: await self._serve(load, [name], num_requests) for name in ("grpc", "sse")}
            points = [await self._serve(load, ["grpc", "sse"], num_requests) for _ in range(_NUM_POINTS)]
            return Measured(ttft, streaming, saturated, points)
        finally:
            await self.direct.close()
            for client in self.clients.values():
                await client.close()

    def pace(self, step_s: float) -> None:
        """The time between two decode steps from now on; 0 makes them as fast as the worker can."""
        self.workers.ask(str(step_s))

    async def _measure_ttft(self, load: Load) -> dict[str, Latencies]:
        seconds: dict[str, list[float]] = {"direct": [], "grpc": [], "sse": []}
        # In turn, so that whatever else the machine does falls on all alike.
        for _ in range(_NUM_WARM_UPS + load.num_latencies):
            seconds["direct"].append(await self.direct.ttft_s(range(2, 66)))
            for name in ("grpc", "sse"):
                seconds[name].append(await ttft_s(self.clients[name], next(self.prompts)))
        return {name: Latencies.of(each[_NUM_WARM_UPS:]) for name, each in seconds.items()}

    async def _measure_streaming(self, load: Load) -> dict[str, list[Streaming]]:
        rounds: dict[str, list[Streaming]] = {"bare": [], "grpc": [], "sse": []}
        for _ in range(load.rounds):
            for name, results in rounds.items():
                server = self.bare if name == "bare" else self.router
                results.append(
                    await measure_streaming(
                        server,
                        self.clients[name],
                        self.prompts,
                        num_streams=load.num_streams,
                        num_tokens=load.num_tokens,
                    )
                )
        return rounds

    async def _serve(self, load: Load, names: Sequence[str], num_requests: int) -> Serving:
        return await measure_serving(
            self.router,
            [self.clients[name] for name in names],
            self.prompts,
            num_requests=num_requests,
            num_streams=load.num_streams,
            num_tokens=load.tokens_per_request,
        )


def measure(load: Load) -> Measured:
    """Starts all processes, measures, and ends them."""
    with contextlib.ExitStack() as stack:
        workers = stack.enter_context(running("bench.mock_workers"))
        told = json.loads(workers.read_line())
        router, addresses = stack.enter_context(running_router(told["membership"]))
        step_s = str(load.step_ms / 1e3)
        bare = stack.enter_context(running("bench.router.bare_server", str(_MESSAGE_BYTES), step_s))

        async def run() -> Measured:
            bench = Bench.open(router=router, addresses=addresses, bare=bare, workers=workers, told=told)
            return await bench.measure(load)

        return uvloop.run(run())


_AT_LEAST_ONE = click.IntRange(min=1)


@click.command()
@click.option("--streams", "num_streams", default=64, show_default=True, type=_AT_LEAST_ONE, help="At a time.")
@click.option(
    "--tokens", "num_tokens", default=160, show_default=True, type=click.IntRange(20, 400), help="Of each long stream."
)
@click.option(
    "--step-ms", default=20.0, show_default=True, type=click.FloatRange(min=1.0), help="Between two tokens of a stream."
)
@click.option("--rounds", default=3, show_default=True, type=_AT_LEAST_ONE, help="Of long streams, each protocol.")
@click.option(
    "--latencies", "num_latencies", default=200, show_default=True, type=_AT_LEAST_ONE, help="First tokens to time."
)
@click.option(
    "--requests", "num_requests", default=10_000, show_default=True, type=_AT_LEAST_ONE, help="Of the long run."
)
@click.option(
    "--tokens-per-request", default=16, show_default=True, type=click.IntRange(1, 400), help="In the long run."
)
@report.output_options
def command(output: str | None, plot: str | None, **options: Any) -> None:
    """Measure what the router adds, alone, in front of mock workers.

    Its CPU time for each token over both protocols, beside a bare gRPC server's; the time that it adds before the first
    token; its memory over a long run.
    """
    load = Load(**options)
    measured = measure(load)
    tables = measured.tables()
    for table in tables:
        report.print_table(table)
    if output is not None:
        outcome = report.Report(
            "router", Provenance.collect(packages=("uvloop", "uvicorn")), dataclasses.asdict(load), measured.to_json()
        )
        outcome.write(output)
    if plot is not None:
        title = "What the router adds"
        write_plot(plot, measured.draw(title=title), title=title, tables=tables)
