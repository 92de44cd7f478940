"""The two processes of `baton bench transfer`: a receiver here, a sender there, each with a pool and nothing else.

The sender does what it is told over a pipe: one order for each push, answered by what it measured. Each has half of the
cores to itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import resource
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, Literal, TypeAlias

import grpc
import torch
from prometheus_client import CollectorRegistry

from baton.config import TransferConfig
from baton.errors import BatonError
from baton.internal.v1 import transfer_pb2, transfer_pb2_grpc
from baton.metrics import TransferMetrics
from baton.requests import AttemptRef
from bench.checkpoint import Sizes
from bench.cores import halves, on_cores
from engine.kv.huge_pages import advise_huge_pages
from engine.kv.layout import KVGroup, KVLayout
from kvtransfer.leading_receiver import LeadingReceiver
from kvtransfer.pages import pool_memory
from kvtransfer.push import Push
from kvtransfer.receiver import Receiver
from kvtransfer.sender import Sender
from kvtransfer.service import KVTransferService
from kvtransfer.ticket import layout_fingerprint
from worker.host import WorkerHost

Transport: TypeAlias = Literal["cuda_ipc", "shm", "collective", "grpc"]
# Runs in the sender's process: answers each (ticket, order) until the pipe says None.
Sending: TypeAlias = Callable[..., None]

CPU = torch.device("cpu")
_MAX_MESSAGE_BYTES = 16 << 20


def cpu_s() -> float:
    """CPU seconds of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def kv_layout(sizes: Sizes, dtype: str) -> KVLayout:
    """That of a model of `sizes`, in blocks of 16 tokens."""
    return KVLayout(
        groups=(KVGroup(tuple(range(sizes.num_layers))),),
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.hidden_size // sizes.num_heads,
        block_size=16,
        dtype=getattr(torch, dtype),
    )


class Released:
    """Receiver events of which only the last matters here."""

    def __init__(self) -> None:
        self.done = threading.Event()

    def committed(self, ref: AttemptRef, first_tokens: Sequence[transfer_pb2.FirstToken]) -> None:
        """Nothing decodes here."""

    def aborted(self, ref: AttemptRef, reason: str) -> None:
        """The sender tells."""

    def released(self, ref: AttemptRef) -> None:
        self.done.set()


@dataclasses.dataclass(slots=True)
class Pair:
    """A receiver and the pipe to its sender."""

    receiver: LeadingReceiver
    layout: KVLayout
    _events: Released
    _pipe: Connection
    _num_orders: int = 0

    def order(self, num_blocks: int, order: Any) -> Any:
        """Reserves blocks, has the sender push into them, releases them, and returns the sender's answer."""
        self._num_orders += 1
        ref = AttemptRef(f"bench-{self._num_orders}", 1)
        blocks = [(0, 0, range(1, num_blocks + 1))]
        ticket = self.receiver.reserve(ref, num_blocks * self.layout.block_size, 0, blocks)
        self._pipe.send((ticket.SerializeToString(), order))
        try:
            return self._pipe.recv()
        finally:
            self._events.done.clear()
            self.receiver.release(ref)
            self._events.done.wait()


@contextlib.contextmanager
def pair(
    transport: Transport,
    layout: KVLayout,
    num_blocks: int,
    sending: Sending,
    *arguments: Any,
    device: torch.device = CPU,
) -> Iterator[Pair]:
    """Starts both ends with pools for `num_blocks` blocks of one group.

    Args:
        device: of the receiver's pool.
        sending: runs in the sender's process, as `sending(pipe, transport, *arguments)`.
    """
    config = TransferConfig(transports=(transport,))
    registry = CollectorRegistry()
    events = Released()
    fingerprint = layout_fingerprint(layout, model="bench")
    leader = LeadingReceiver(fingerprint, "decode-0", 1, config, events)
    memory = pool_memory(make_pool(layout, num_blocks, device))
    receiver = Receiver(memory, layout, fingerprint, "decode-0", 1, config, TransferMetrics(registry), leader)

    def register(server: grpc.aio.Server) -> None:
        transfer_pb2_grpc.add_KVTransferServicer_to_server(KVTransferService(leader), server)

    host = WorkerHost("127.0.0.1", max_message_bytes=_MAX_MESSAGE_BYTES, registry=registry)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=sending, args=(there, transport, *arguments), daemon=True)
    our_cores, their_cores = halves()
    with on_cores(our_cores):
        try:
            host.start(register)
            receiver.listen("127.0.0.1")
            leader.lead([receiver], host.address)
            with on_cores(their_cores):
                child.start()
            # A child that dies then ends the pipe here.
            there.close()
            yield Pair(leader, layout, events, here)
            here.send(None)
            child.join()
        finally:
            if child.is_alive():
                child.terminate()
                child.join()
            host.stop()
            receiver.close()


def make_pool(layout: KVLayout, num_blocks: int, device: torch.device = CPU) -> torch.Tensor:
    """Memory as an engine's cache has it, written once so that no page of it is faulted in while it is measured."""
    pool = torch.empty(layout.pool_shape(num_blocks + 1), dtype=layout.dtype, device=device)
    if device.type == "cpu":
        advise_huge_pages(pool)
    return pool.fill_(1)


def make_sender(pool: torch.Tensor, layout: KVLayout, transport: Transport) -> Sender:
    return Sender(
        pool_memory(pool),
        layout,
        layout_fingerprint(layout, model="bench"),
        "prefill-0",
        1,
        TransferConfig(transports=(transport,)),
        TransferMetrics(CollectorRegistry()),
    )


class Pushing:
    """One push and its end."""

    def __init__(self, sender: Sender, ticket: bytes) -> None:
        self._ended = threading.Event()
        self._error: BatonError | None = None
        self.push = sender.open(transfer_pb2.Ticket.FromString(ticket), self._on_done)

    def commit(self) -> float:
        """Commits; returns `time.perf_counter` at the receiver's answer. Raises what went wrong."""
        self.push.commit([transfer_pb2.FirstToken(choice=0, token_id=1)])
        self._ended.wait()
        if self._error is not None:
            raise self._error
        return self._ended_s

    def _on_done(self, push: Push, error: BatonError | None) -> None:
        self._ended_s = time.perf_counter()
        self._error = error
        self._ended.set()
