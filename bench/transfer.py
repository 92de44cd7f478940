"""KV transfers between two processes of this host: `python -m bench.transfer`.

For each transport the time from `Sender.open` to the receiver's answer to Commit, copy-in and checksums included, for a
long prompt (GB/s, and as a share of this machine's copy bandwidth, measured in the same run) and for a single block
(latency). The pool is that of a Llama with 12 layers, 4 KV heads of 64 and bfloat16, in blocks of 16 tokens.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Literal

import click
import grpc
import numpy as np
import torch
from prometheus_client import CollectorRegistry
from rich.console import Console
from rich.table import Table

from baton.config import TransferConfig
from baton.errors import BatonError
from baton.internal.v1 import transfer_pb2, transfer_pb2_grpc
from baton.metrics import TransferMetrics
from baton.requests import AttemptRef
from engine.kv.layout import KVGroup, KVLayout
from kvtransfer.pages import PageMemory
from kvtransfer.receiver import Receiver
from kvtransfer.sender import Sender
from kvtransfer.service import KVTransferService
from kvtransfer.ticket import layout_fingerprint
from worker.host import WorkerHost

Transport = Literal["shm", "grpc"]

LAYOUT = KVLayout(groups=(KVGroup(tuple(range(12))),), num_kv_heads=4, head_dim=64, block_size=16, dtype=torch.bfloat16)
COPY_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """Seconds of each round, and the bytes that one of them moves."""

    seconds: tuple[float, ...]
    num_bytes: int

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def bytes_per_s(self) -> float:
        return self.num_bytes / self.median_s


def copy_bandwidth(rounds: int) -> float:
    """Bytes per second that one thread copies from one large array to another."""
    source, target = np.ones(COPY_BYTES, np.uint8), np.empty(COPY_BYTES, np.uint8)
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - started)
    return COPY_BYTES / statistics.median(seconds)


class ReleasedEvents:
    """Receiver events of which only the last matters here."""

    def __init__(self) -> None:
        self.done = threading.Event()

    def committed(self, ref: AttemptRef, first_tokens: Sequence[transfer_pb2.FirstToken]) -> None:
        """Nothing decodes here."""

    def aborted(self, ref: AttemptRef, reason: str) -> None:
        """The sender tells."""

    def released(self, ref: AttemptRef) -> None:
        self.done.set()


def run_sender(connection: Connection, transport: Transport, num_blocks: int) -> None:
    """The other process: for each ticket that comes, push `num_blocks` blocks of all layers and answer with seconds."""
    pool = torch.ones(LAYOUT.pool_shape(num_blocks + 1), dtype=LAYOUT.dtype)
    sender = Sender(
        PageMemory.from_pool(pool),
        LAYOUT,
        layout_fingerprint(LAYOUT, model="bench"),
        "prefill-0",
        1,
        TransferConfig(transports=(transport,)),
        TransferMetrics(CollectorRegistry()),
    )
    block_ids = list(range(1, num_blocks + 1))
    while ticket := connection.recv_bytes():
        connection.send(push_once(sender, transfer_pb2.Ticket.FromString(ticket), block_ids))
    sender.close()


def push_once(sender: Sender, ticket: transfer_pb2.Ticket, block_ids: Sequence[int]) -> float:
    """Seconds from open to the answer of Commit."""
    ended = threading.Event()
    errors: list[BatonError] = []

    def on_done(_push: object, error: BatonError | None) -> None:
        if error is not None:
            errors.append(error)
        ended.set()

    started = time.perf_counter()
    push = sender.open(ticket, on_done)
    for slot in range(LAYOUT.num_slots):
        push.send(0, slot, 0, block_ids)
    push.commit([transfer_pb2.FirstToken(choice=0, token_id=1)])
    ended.wait()
    if errors:
        raise errors[0]
    return time.perf_counter() - started


def measure(transport: Transport, num_blocks: int, rounds: int) -> Result:
    """Times `rounds` transfers of `num_blocks` blocks after one that makes the connection."""
    config = TransferConfig(transports=(transport,))
    events = ReleasedEvents()
    pool = torch.zeros(LAYOUT.pool_shape(num_blocks + 1), dtype=LAYOUT.dtype)
    registry = CollectorRegistry()
    receiver = Receiver(
        PageMemory.from_pool(pool),
        LAYOUT,
        layout_fingerprint(LAYOUT, model="bench"),
        "decode-0",
        1,
        config,
        TransferMetrics(registry),
        events,
    )
    host = WorkerHost("127.0.0.1", max_message_bytes=16 << 20, registry=registry)
    host.start(register_transfer(receiver, config.timeout_s))
    receiver.listen("127.0.0.1", host.address)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=run_sender, args=(there, transport, num_blocks))
    child.start()
    seconds = []
    for index in range(rounds + 1):
        ref = AttemptRef(f"bench-{index}", 1)
        block_ids = list(range(1, num_blocks + 1))
        ticket = receiver.reserve(ref, num_blocks * LAYOUT.block_size, 0, [(0, 0, block_ids)])
        here.send_bytes(ticket.SerializeToString())
        seconds.append(here.recv())
        events.done.clear()
        receiver.release(ref)
        events.done.wait()
    here.send_bytes(b"")
    child.join()
    host.stop()
    receiver.close()
    return Result(tuple(seconds[1:]), num_blocks * LAYOUT.block_bytes)


def register_transfer(receiver: Receiver, timeout_s: float) -> Callable[[grpc.aio.Server], None]:
    """Adds the receiver's control service to a host's server."""

    def register(server: grpc.aio.Server) -> None:
        transfer_pb2_grpc.add_KVTransferServicer_to_server(KVTransferService(receiver, timeout_s), server)

    return register


@click.command()
@click.option("--tokens", default=2048, show_default=True, help="Length of the long prompt.")
@click.option("--rounds", default=20, show_default=True, help="Transfers of which the median is taken.")
def main(tokens: int, rounds: int) -> None:
    """Measure every transport between two processes."""
    limit = copy_bandwidth(rounds)
    num_blocks = LAYOUT.num_blocks(tokens)
    table = Table(title=f"{num_blocks * LAYOUT.block_bytes / 1e6:.1f} MB, medians of {rounds}")
    for column in ("transport", "ms", "GB/s", "of a plain copy", "one block, ms"):
        table.add_column(column, justify="left" if column == "transport" else "right")
    transports: tuple[Transport, ...] = ("shm", "grpc")
    for transport in transports:
        prompt, block = measure(transport, num_blocks, rounds), measure(transport, 1, rounds)
        table.add_row(
            transport,
            f"{prompt.median_s * 1e3:.1f}",
            f"{prompt.bytes_per_s / 1e9:.2f}",
            f"{prompt.bytes_per_s / limit:.0%}",
            f"{block.median_s * 1e3:.2f}",
        )
    console = Console()
    console.print(table)
    console.print(f"plain copy: {limit / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
