"""One measurement: asks what is served, warms up, loads, and measures until the load ends or is interrupted."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from bench.load.load import Load
from bench.load.measures import Measures, Objectives
from bench.load.runner import LoadRun, OnEnded, run_load, warm_up
from bench.load.targets import ServedModel, Target


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """A run with what it says. `client_cpu_share` is how much of one core the generator took."""

    model: ServedModel
    run: LoadRun
    measures: Measures
    client_cpu_share: float

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model.name,
            "interrupted": self.run.interrupted,
            "client_cpu_share": self.client_cpu_share,
            **self.measures.to_json(),
        }


async def measure(
    target: Target,
    load: Load,
    *,
    objectives: Objectives | None = None,
    progress: Callable[[int], OnEnded] | None = None,
) -> Measured:
    """Warms a server up, loads it, and measures; an interrupt (SIGINT) ends the load early.

    Args:
        progress: is called with the number of answers to come, and returns what is called with each outcome.

    Raises:
        BatonError: the server cannot be reached, or the warm-up failed.
        ValueError: the load cannot be.
    """
    model = await target.served_model()
    requests, num_answers = load.requests(model)
    await warm_up(target, load.warm_up_requests(model))
    on_ended = None if progress is None else progress(num_answers)
    with _interrupts() as stop:
        cpu_s = time.process_time()
        run = await run_load(target, requests, concurrency=load.concurrency, stop=stop, on_ended=on_ended)
        cpu_s = time.process_time() - cpu_s
    return Measured(model, run, Measures.of(run, objectives), cpu_s / run.duration_s)


@contextlib.contextmanager
def _interrupts() -> Iterator[asyncio.Event]:
    """An event that the first SIGINT sets; a second one is as ever."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    before = signal.getsignal(signal.SIGINT)

    def interrupted() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    loop.add_signal_handler(signal.SIGINT, interrupted)
    try:
        yield stop
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, before)
