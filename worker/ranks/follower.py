"""The process of a rank after the first: `python -m worker.ranks.follower STEPS TRANSFERS`, two sockets to the leader.

The main thread does what the leader has it do, in order, transfers' part included: what comes before a reservation may
still touch its blocks. Events of transfers go the other way. A second thread ends the process when the leader is gone,
whatever the first one does. So does an error: the leader finds its follower gone.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterable, Sequence
from typing import NoReturn

import torch
from prometheus_client import CollectorRegistry, start_http_server

from baton import logs
from baton.config import WorkerConfig, model_name
from baton.errors import BatonError
from baton.internal.v1 import ranks_pb2
from baton.metrics import ProcessMetrics, TransferMetrics
from engine.engine import load_engine
from engine.parallel.group import RankGroup, follow
from engine.parallel.wire import batch_from_arrays
from kvtransfer.following_sender import FollowingSender
from kvtransfer.pages import pool_memory
from kvtransfer.receiver import Receiver
from kvtransfer.sender import Sender
from kvtransfer.ticket import layout_fingerprint
from worker.ranks.channel import Array, Channel
from worker.ranks.team import TIMEOUT_S, rank_device
from worker.ranks.transfers import EventsToLeader, do_receiving, do_sending, rank_heads, send_run

logger = logging.getLogger(__name__)


class Follower:
    """A rank that does what its leader does."""

    def __init__(self, order: ranks_pb2.RankOrder, transfers: Channel[ranks_pb2.RankCommand]) -> None:
        """Loads the rank's engine, while the others load theirs."""
        config = WorkerConfig.model_validate_json(order.config)
        self._device = rank_device(config, order.rank)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        size = config.tensor_parallel_size
        self._group = RankGroup(
            follow(order.store_port, TIMEOUT_S),
            rank=order.rank,
            size=size,
            device=self._device,
            timeout_s=TIMEOUT_S,
        )
        self._engine = load_engine(
            config.model,
            config.cache,
            chunk_tokens=order.chunk_tokens,
            decode_sequences=order.decode_sequences,
            group=self._group,
        )
        self._transfers = transfers
        registry = CollectorRegistry()
        ProcessMetrics(registry)
        self._transfer_metrics = TransferMetrics(registry)
        server, _ = start_http_server(0, addr=config.host, registry=registry)
        self._metrics_address = f"{config.host}:{server.server_port}"
        layout = self._engine.layout
        self._locations = [layout.location(layer) for layer in range(layout.num_layers)]
        self._sender: FollowingSender | None = None
        self._receiver: Receiver | None = None
        self._join_transfers(config, order.rank)

    def run(self, steps: Channel[ranks_pb2.RankCommand]) -> None:
        """Says that it is ready, and does what comes; returns when the leader has hung up."""
        shard = None if self._receiver is None else self._receiver.shard
        ready = ranks_pb2.RankReady(shard=shard, metrics_address=self._metrics_address)
        self._transfers.send(ranks_pb2.RankEvent(ready=ready))
        while True:
            try:
                command, arrays = steps.receive()
            except EOFError:
                return
            self._do(command, arrays)

    def _join_transfers(self, config: WorkerConfig, rank: int) -> None:
        """Makes this rank's end of the data plane."""
        layout, size = self._engine.layout, config.tensor_parallel_size
        memory = pool_memory(self._engine.cache.kv, rank_heads(layout.num_kv_heads, rank))
        fingerprint = layout_fingerprint(
            layout, model=model_name(config.model), revision=self._engine.revision, degree=size
        )
        metrics = self._transfer_metrics
        events = EventsToLeader(self._transfers)
        if config.role == "prefill":
            sender = Sender(memory, layout, fingerprint, config.name, config.epoch, config.transfer, metrics, rank=rank)
            self._sender = FollowingSender(sender, events)
        else:
            self._receiver = Receiver(
                memory, layout, fingerprint, config.name, config.epoch, config.transfer, metrics, events, rank=rank
            )
            self._receiver.listen(config.host)

    def _do(self, command: ranks_pb2.RankCommand, arrays: list[Array]) -> None:
        match command.WhichOneof("command"):
            case "step":
                self._step(command.step, arrays)
            case "copy_block":
                self._engine.cache.copy_block(command.copy_block.source, command.copy_block.target)
            case "spoil_blocks":
                self._engine.cache.spoil(arrays[0].tolist())
            case "receive":
                assert self._receiver is not None, "a prefill worker's ranks receive nothing"
                do_receiving(command.receive, self._receiver)
            case _:
                assert self._sender is not None, "a decode worker's ranks send nothing"
                do_sending(command, self._sender, self._locations)

    @torch.inference_mode()
    def _step(self, step: ranks_pb2.RankStep, arrays: list[Array]) -> None:
        chosen = None
        if step.num_chosen:
            chosen = self._group.share(torch.empty(step.num_chosen, dtype=torch.int64, device=self._device))
        on_layer = (lambda layer: self._send(step.pages, layer)) if step.announces else None
        self._engine.runner.execute_batch(batch_from_arrays(arrays), on_layer, chosen=chosen)

    def _send(self, pages: Iterable[ranks_pb2.PageRun], layer: int) -> None:
        """A layer's KV of this step is final."""
        if self._sender is not None:
            for run in pages:
                send_run(run, self._sender, [self._locations[layer]])


def run(sockets: Sequence[socket.socket]) -> int:
    """Is a follower, over sockets of steps and of transfers to its leader, and returns the exit status."""
    # Ctrl-C is the leader's to handle.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    steps, transfers = Channel(sockets[0], ranks_pb2.RankCommand), Channel(sockets[1], ranks_pb2.RankCommand)
    try:
        order = steps.receive()[0].order
    except EOFError:
        return 1
    config = WorkerConfig.model_validate_json(order.config)
    logs.configure(config.log, role=config.role, worker=f"{config.name}/rank-{order.rank}")
    threading.Thread(target=_follow_leader, args=(transfers,), name="leader", daemon=True).start()
    try:
        _make(order, transfers).run(steps)
    except Exception:
        logger.exception("the rank ends")
        return 1
    return 0


def _make(order: ranks_pb2.RankOrder, transfers: Channel[ranks_pb2.RankCommand]) -> Follower:
    """A follower; where it cannot start the leader hears why."""
    try:
        return Follower(order, transfers)
    except (ValueError, BatonError) as error:
        transfers.send(ranks_pb2.RankEvent(failed=str(error)))
        end(1)


def _follow_leader(transfers: Channel[ranks_pb2.RankCommand]) -> None:
    """Ends the process when the leader is gone, which says nothing over this channel."""
    try:
        transfers.receive()
    except EOFError:
        end(1)
    except Exception:
        logger.exception("the rank ends")
        end(1)


def end(exit_code: int) -> NoReturn:
    """Ends the process at once: nobody waits for what other threads do."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(exit_code)


if __name__ == "__main__":
    end(run([socket.socket(fileno=int(descriptor)) for descriptor in sys.argv[1:]]))
