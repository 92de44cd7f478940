"""The leader's side: makes the followers' processes, tells them what to do, and ends with any of them.

The engine's thread calls what `engine.parallel.leading.Followers` has; a thread for each follower takes its events.
"""

from __future__ import annotations

import functools
import logging
import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NoReturn

import numpy as np
import torch

from baton.config import WorkerConfig
from baton.internal.v1 import ranks_pb2, transfer_pb2
from engine.batch import Batch
from engine.engine import Engine, load_engine
from engine.model_loader import resolve_device
from engine.parallel.group import RankGroup, lead
from engine.parallel.wire import batch_to_arrays
from worker.ranks.channel import Array, Channel
from worker.ranks.pages import PageRun, StepPages
from worker.ranks.processes import GRACE_S, Launched, Process, Sockets, describe_end
from worker.ranks.transfers import OnEvent

logger = logging.getLogger(__name__)

# Longest wait of a rank for the others: in loading, which may be from a slow disk, and in a step.
TIMEOUT_S = 300.0


def rank_config(config: WorkerConfig, rank: int) -> WorkerConfig:
    """What a rank of a worker is made from: its share of the worker's threads, and of nobody else's.

    The leader's cores stand for all: where workers mind each other's, the others know when it computes.
    """
    threads = max(1, (config.model.num_threads or torch.get_num_threads()) // config.tensor_parallel_size)
    most = threads if config.model.max_threads and rank == 0 else 0
    share = {"num_threads": threads, "max_threads": most}
    return config.model_copy(update={"model": config.model.model_copy(update=share)})


def rank_device(config: WorkerConfig, rank: int) -> torch.device:
    """What a rank computes on.

    Raises:
        ValueError: there is no such GPU.
    """
    device = resolve_device(config.model.device)
    if device.type != "cuda":
        return device
    if (size := config.tensor_parallel_size) > (count := torch.cuda.device_count()):
        raise ValueError(f"{config.role}.tensor_parallel_size: {size} GPUs are wanted, and {count} there")
    return torch.device(device.type, rank)


class RankTeam:
    """The followers of one worker; none where it is of one rank.

    Made, loaded, started and closed by the actor's thread.

    Args:
        launched: the followers' processes, which this owns from now on.
        on_lost: called, from any thread, when a follower is gone or out of step; by default ends this process.

    Attributes:
        metrics_addresses: host:port of each follower's /metrics, once they have started.
    """

    def __init__(
        self,
        config: WorkerConfig,
        launched: Launched,
        *,
        on_lost: Callable[[], None] | None = None,
    ) -> None:
        self._config = config
        self._launched = launched
        self._on_lost = on_lost or _end_process
        self.metrics_addresses: list[str] = []
        self._group: RankGroup | None = None
        self._closing = threading.Event()
        self._failure: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._followers = [
            _Follower(config.name, rank, process, sockets, self._closing, self._failure, self._lose)
            for rank, (process, sockets) in enumerate(zip(launched.processes, launched.sockets, strict=True), 1)
        ]

    def load(self, *, chunk_tokens: int, decode_sequences: int) -> Engine:
        """The leader's engine, loaded while the followers load theirs; arguments as of `load_engine`.

        Raises:
            ValueError: as of `load_engine`, in whichever rank.
        """
        load = functools.partial(load_engine, chunk_tokens=chunk_tokens, decode_sequences=decode_sequences)
        if not self._followers:
            return load(self._config.model, self._config.cache)
        config = rank_config(self._config, 0)
        device = rank_device(config, 0)
        store = lead(TIMEOUT_S)
        try:
            for rank, follower in enumerate(self._followers, 1):
                order = ranks_pb2.RankOrder(
                    config=rank_config(self._config, rank).model_dump_json(),
                    rank=rank,
                    chunk_tokens=chunk_tokens,
                    decode_sequences=decode_sequences,
                    store_port=store.port,
                )
                follower.steps.send(ranks_pb2.RankCommand(order=order))
            size = config.tensor_parallel_size
            self._group = RankGroup(store, rank=0, size=size, device=device, timeout_s=TIMEOUT_S)
            return load(config.model, config.cache, group=self._group, followers=self)
        except (RuntimeError, OSError) as error:
            # A collective that a follower did not take part in.
            try:
                raise ValueError(self._failure.get(timeout=GRACE_S)) from error
            except queue.Empty:
                raise error from None

    def start(self, on_event: OnEvent) -> list[transfer_pb2.Shard]:
        """Waits until every follower is ready.

        Args:
            on_event: what takes a follower's events from then on, on a thread of its own.

        Returns:
            Where each follower receives which heads, of a decode worker.
        """
        ready = [follower.start(on_event) for follower in self._followers]
        self.metrics_addresses = [each.metrics_address for each in ready]
        return [each.shard for each in ready]

    def close(self) -> None:
        """Ends the followers and waits for them. Idempotent."""
        self._closing.set()
        for follower in self._followers:
            follower.steps.close()
        self._launched.close()
        for follower in self._followers:
            follower.join()
        if self._group is not None:
            self._group.close()

    # What the engine has the followers do

    def step(self, batch: Batch, on_layer: Callable[[int], None] | None, chosen: torch.Tensor | None) -> None:
        assert on_layer is None or isinstance(on_layer, StepPages), "followers cannot do what that does"
        pages = [] if on_layer is None else [run.to_wire() for run in on_layer.runs]
        num_chosen = 0 if chosen is None else len(chosen)
        step = ranks_pb2.RankStep(announces=on_layer is not None, num_chosen=num_chosen, pages=pages)
        self.tell(ranks_pb2.RankCommand(step=step), batch_to_arrays(batch))
        if chosen is not None:
            assert self._group is not None
            self._group.share(chosen)

    def copy_block(self, source: int, target: int) -> None:
        self.tell(ranks_pb2.RankCommand(copy_block=ranks_pb2.CopyBlock(source=source, target=target)))

    def spoil(self, block_ids: Sequence[int]) -> None:
        self.tell(ranks_pb2.RankCommand(spoil_blocks=ranks_pb2.SpoilBlocks()), [np.asarray(block_ids, np.int64)])

    def give_up(self, error: BaseException) -> None:
        self._lose(f"a step failed that they have begun ({type(error).__name__}: {error})")

    # What the data plane has them do

    def tell(self, command: ranks_pb2.RankCommand, arrays: Sequence[Array] = ()) -> None:
        """Has all followers do something, after all that they were told before.

        Raises:
            OSError: one is gone.
        """
        for follower in self._followers:
            follower.steps.send(command, arrays)

    def send(self, run: PageRun) -> None:
        """Has each send the pages of all layers, beside what their leader sends itself."""
        self.tell(ranks_pb2.RankCommand(send=run.to_wire()))

    @property
    def steps(self) -> Sequence[Channel[ranks_pb2.RankEvent]]:
        """Each follower's channel of steps, to send."""
        return [follower.steps for follower in self._followers]

    def _lose(self, reason: str) -> None:
        if not self._closing.is_set():
            logger.error("%s ends: %s", self._config.name, reason)
            self._on_lost()


class _Follower:
    """One follower's process, its two channels, and the thread that takes its events."""

    def __init__(
        self,
        worker: str,
        rank: int,
        process: Process,
        sockets: Sockets,
        closing: threading.Event,
        failure: queue.SimpleQueue[str],
        lose: Callable[[str], None],
    ) -> None:
        self._rank = rank
        self._process = process
        self._closing = closing
        self._failure = failure
        self._lose = lose
        self._on_event: OnEvent | None = None
        self._ready: Future[ranks_pb2.RankReady] = Future()
        self.steps = Channel(sockets[0], ranks_pb2.RankEvent)
        self.transfers = Channel(sockets[1], ranks_pb2.RankEvent)
        self._reader = threading.Thread(target=self._read, name=f"{worker}-rank-{rank}", daemon=True)
        self._reader.start()

    def start(self, on_event: OnEvent) -> ranks_pb2.RankReady:
        """Waits until it is ready; raises ValueError where it says that it cannot be."""
        self._on_event = on_event
        return self._ready.result()

    def join(self) -> None:
        """Waits for the thread; the process has ended."""
        self._reader.join()
        self.transfers.close()

    def _read(self) -> None:
        try:
            while True:
                self._take(self.transfers.receive()[0])
        except EOFError:
            self._gone()
        except Exception as error:
            logger.exception("an event of rank %d is not understood", self._rank)
            self._lose(f"an event of its rank {self._rank} failed ({type(error).__name__}: {error})")

    def _take(self, event: ranks_pb2.RankEvent) -> None:
        match event.WhichOneof("event"):
            case "ready":
                self._ready.set_result(event.ready)
            case "failed":
                self._failure.put(event.failed)
                self._ready.set_exception(ValueError(event.failed))
            case _:
                assert self._on_event is not None, "events come from followers that are ready"
                self._on_event(event)

    def _gone(self) -> None:
        reason = f"its rank {self._rank} is gone ({describe_end(self._process)})"
        if not self._ready.done():
            self._failure.put(reason)
            self._ready.set_exception(ValueError(reason))
        if (error := self._ready.exception()) is not None:
            reason = f"its rank {self._rank} did not start ({error})"
            # The leader is told as one that cannot start, if it does not wait for the other in a collective.
            self._closing.wait(GRACE_S)
        self._lose(reason)


def _end_process() -> NoReturn:
    """At once: other threads may wait in a collective for what will not come."""
    logging.shutdown()
    os._exit(1)
