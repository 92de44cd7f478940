"""The two ends of a transfer as tests hold them: a pool, its receiver or sender, and what was heard of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import numpy as np
import torch
from prometheus_client import CollectorRegistry

from baton.config import TransferConfig
from baton.errors import BatonError
from baton.internal.v1 import transfer_pb2, transfer_pb2_grpc
from baton.metrics import TransferMetrics
from baton.requests import AttemptRef
from engine.kv.layout import KVGroup, KVLayout
from kvtransfer import transports
from kvtransfer.leading_receiver import LeadingReceiver
from kvtransfer.pages import HeadRange, HostPages, PageMemory
from kvtransfer.push import Push
from kvtransfer.receiver import Receiver
from kvtransfer.sender import Sender
from kvtransfer.service import KVTransferService
from kvtransfer.ticket import layout_fingerprint
from kvtransfer.transports.base import Transport
from tests.kvtransfer.host_device import HostDevice, device_pages

WAIT_S = 20.0

# Transports whose payloads pass through memory of the host.
BUFFERED = tuple(name for name in transports.TRANSPORTS if name != "cuda_ipc")

# A full group with three layers and a sliding one with two; a page has 256 bytes.
HYBRID = KVLayout(
    groups=(KVGroup((0, 2, 4)), KVGroup((1, 3), window=32)),
    num_kv_heads=1,
    head_dim=4,
    block_size=8,
    dtype=torch.float32,
)


def small(*transports: str, **changes: float) -> TransferConfig:
    """A config with which the tests' transfers take many frames and the ring wraps."""
    fields = {"frame_bytes": 1024, "ring_bytes": 4096, "timeout_s": 10.0, "transports": transports} | changes
    return TransferConfig.model_validate(fields)


def ref(name: str, attempt: int = 0) -> AttemptRef:
    return AttemptRef(name, attempt)


def random_pages(layout: KVLayout, num_blocks: int, seed: int) -> np.ndarray:
    shape = (layout.num_slots, num_blocks, layout.page_bytes)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def sample(metrics_registry: CollectorRegistry, name: str, **labels: str) -> float:
    return metrics_registry.get_sample_value(name, labels) or 0.0


class Recorder:
    """ReceiverEvents that remembers, in order, and lets tests wait."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.log: list[tuple[str, AttemptRef]] = []
        self.reasons: dict[AttemptRef, str] = {}
        self.first_tokens: dict[AttemptRef, list[transfer_pb2.FirstToken]] = {}

    def committed(self, ref: AttemptRef, first_tokens: list[transfer_pb2.FirstToken]) -> None:
        self.first_tokens[ref] = first_tokens
        self._add("committed", ref)

    def aborted(self, ref: AttemptRef, reason: str) -> None:
        self.reasons[ref] = reason
        self._add("aborted", ref)

    def released(self, ref: AttemptRef) -> None:
        self._add("released", ref)

    def wait(self, event: str, ref: AttemptRef) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: (event, ref) in self.log, WAIT_S), f"no {event} of {ref}: {self.log}"

    def of(self, ref: AttemptRef) -> list[str]:
        with self._changed:
            return [event for event, other in self.log if other == ref]

    def _add(self, event: str, ref: AttemptRef) -> None:
        with self._changed:
            self.log.append((event, ref))
            self._changed.notify_all()


class ControlServer:
    """A grpc.aio server with the KVTransfer service, on an event loop in a thread of its own."""

    def __init__(self, receiver: LeadingReceiver) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="control-server")
        self._thread.start()
        self._run(self._start(receiver))

    def close(self) -> None:
        if self._loop.is_closed():
            return
        self._run(self._server.stop(grace=None))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self, receiver: LeadingReceiver) -> None:
        self._server = grpc.aio.server()
        transfer_pb2_grpc.add_KVTransferServicer_to_server(KVTransferService(receiver), self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()

    def _run(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(WAIT_S)


def is_on_device(config: TransferConfig, on_device: bool | None) -> bool:
    """Whether a pool lies on the tests' device: if a transport wants one, unless a test says."""
    return "cuda_ipc" in config.transports if on_device is None else on_device


def pool_of(
    pages: np.ndarray, heads: HeadRange, make_memory: Callable[[np.ndarray, HeadRange], PageMemory], on_device: bool
) -> tuple[np.ndarray, PageMemory]:
    """A pool of this content."""
    if on_device:
        device = HostDevice()
        shared = device.share(pages)
        return shared, device_pages(shared, heads, device)
    copy = pages.copy()
    return copy, make_memory(copy, heads)


class DecodeSide:
    """A pool that receives."""

    def __init__(
        self,
        config: TransferConfig,
        layout: KVLayout = HYBRID,
        num_blocks: int = 64,
        *,
        worker: str = "decode-0",
        epoch: int = 1,
        make_memory: Callable[[np.ndarray, HeadRange], PageMemory] = HostPages,
        on_device: bool | None = None,
        model: str = "model",
    ) -> None:
        self.layout = layout
        self.before = random_pages(layout, num_blocks, seed=1)
        heads = HeadRange(0, layout.num_kv_heads)
        self.pages, self.memory = pool_of(self.before, heads, make_memory, is_on_device(config, on_device))
        self.events = Recorder()
        self.registry = CollectorRegistry()
        fingerprint = layout_fingerprint(layout, model=model)
        self.leader = LeadingReceiver(fingerprint, worker, epoch, config, self.events)
        self.receiver = Receiver(
            self.memory, layout, fingerprint, worker, epoch, config, TransferMetrics(self.registry), self.leader
        )
        self._control = ControlServer(self.leader)
        self.receiver.listen("127.0.0.1")
        self.leader.lead([self.receiver], self._control.address)

    def reserve(
        self, ref: AttemptRef, *blocks: tuple[int, int, Sequence[int]], num_blocks: int = 16
    ) -> transfer_pb2.Ticket:
        """Reserves (group, first_block, block_ids) for a prompt of `num_blocks` blocks."""
        return self.leader.reserve(ref, num_blocks * self.layout.block_size, 0, blocks)

    def close(self) -> None:
        self.receiver.close()
        self._control.close()


class PrefillSide:
    """A pool that is sent from."""

    def __init__(
        self,
        config: TransferConfig,
        layout: KVLayout = HYBRID,
        num_blocks: int = 64,
        *,
        worker: str = "prefill-0",
        epoch: int = 2,
        load: Callable[[str], Transport] = transports.load,
        make_memory: Callable[[np.ndarray, HeadRange], PageMemory] = HostPages,
        on_device: bool | None = None,
        model: str = "model",
    ) -> None:
        self.layout = layout
        heads = HeadRange(0, layout.num_kv_heads)
        pages = random_pages(layout, num_blocks, seed=2)
        self.pages, self.memory = pool_of(pages, heads, make_memory, is_on_device(config, on_device))
        self.registry = CollectorRegistry()
        self.sender = Sender(
            self.memory,
            layout,
            layout_fingerprint(layout, model=model),
            worker,
            epoch,
            config,
            TransferMetrics(self.registry),
            load=load,
        )

    def open(self, ticket: transfer_pb2.Ticket) -> Sending:
        return Sending(self, ticket)

    def close(self) -> None:
        self.sender.close()


class Sending:
    """A push and its outcome."""

    def __init__(self, side: PrefillSide, ticket: transfer_pb2.Ticket) -> None:
        self._side = side
        self._done = threading.Event()
        self.outcomes: list[BatonError | None] = []
        self.told: list[Push] = []
        self.push = side.sender.open(ticket, self._on_done)

    def send_all(self, group: int, first_block: int, block_ids: Sequence[int]) -> None:
        """Sends the pages of these blocks in every slot of the group."""
        for slot in range(len(self._side.layout.groups[group].layers)):
            self.push.send(group, slot, first_block, block_ids)

    def commit(self) -> None:
        self.push.commit([transfer_pb2.FirstToken(choice=0, token_id=7)])

    def outcome(self) -> BatonError | None:
        """Waits for `on_done`."""
        assert self._done.wait(WAIT_S), "on_done was not called"
        assert self.told == [self.push]
        return self.outcomes[0]

    def _on_done(self, push: Push, error: BatonError | None) -> None:
        self.told.append(push)
        self.outcomes.append(error)
        self._done.set()
