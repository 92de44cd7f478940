"""How payloads pass in a group of two: from one GPU's memory to another's, or through the memory of the hosts.

Two pools on different GPUs take the first way (NCCL refuses two processes on one GPU), all others the second (Gloo).
The receiver decides, since it hears first what the sender has.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from baton.errors import BatonError
from kvtransfer.arrival import Arrival, HostCarrier
from kvtransfer.device import DeviceGroup
from kvtransfer.device_pages import DevicePages
from kvtransfer.frame import Frame
from kvtransfer.pages import BlockIds, Bytes, PageMemory
from kvtransfer.pair_group import RECEIVER, SENDER, LocalStore, PairGroup, Pending, RemoteStore

# The store's key of what the receiver has decided, and what that may be.
_BACKEND = "backend"
_DEVICES, _HOSTS = b"nccl", b"gloo"


class SendingEnd(Protocol):
    """Used by the link's thread."""

    def send(self, frame: Frame, memory: PageMemory, block_ids: BlockIds, position: int) -> int:
        """Begins to send the pages of a frame, by way of `position` of its buffer; the checksum of the payload."""

    def close(self) -> None:
        """Hangs up. Idempotent."""


class ReceivingEnd(Protocol):
    """Used by the stream's thread."""

    def receive(self, frame: Frame) -> Any:
        """Waits for the payload of the next frame, which stays until the next call."""

    def copy_in(self, memory: PageMemory, arrivals: Sequence[Arrival[Any]]) -> list[BatonError | None]:
        """As `Carrier.copy_in`."""

    def close(self) -> None:
        """Hangs up. Idempotent."""


def group_device(memory: PageMemory) -> str:
    """The GPU that payloads of this pool can leave from or come to; empty for the host's memory."""
    return memory.device.uuid if isinstance(memory, DevicePages) and memory.device.has_groups else ""


def join_sender(
    store: LocalStore, memory: PageMemory, their_device: str, *, host: str, max_payload_bytes: int, timeout_s: float
) -> ReceivingEnd:
    """The receiver's end; blocks until both have joined. Raises UnavailableError if they do not."""
    ours = group_device(memory)
    is_direct = ours != "" and their_device not in ("", ours)
    store.set(_BACKEND, _DEVICES if is_direct else _HOSTS)
    if is_direct:
        assert isinstance(memory, DevicePages)
        return _DeviceReceiving(memory, memory.device.group(store, RECEIVER, timeout_s), max_payload_bytes)
    return _HostReceiving(PairGroup(store, RECEIVER, host=host, timeout_s=timeout_s), max_payload_bytes)


def join_receiver(
    store: RemoteStore, memory: PageMemory, *, host: str, capacity_bytes: int, max_frames: int, timeout_s: float
) -> SendingEnd:
    """The sender's end; blocks until both have joined.

    Args:
        capacity_bytes, max_frames: what may be under way.

    Raises:
        UnavailableError: they do not.
    """
    if store.get(_BACKEND) == _DEVICES:
        assert isinstance(memory, DevicePages)
        return _DeviceSending(memory, memory.device.group(store, SENDER, timeout_s), capacity_bytes)
    return _HostSending(PairGroup(store, SENDER, host=host, timeout_s=timeout_s), capacity_bytes, max_frames)


class _HostSending:
    def __init__(self, group: PairGroup, capacity_bytes: int, max_frames: int) -> None:
        self._group = group
        self._staging: Bytes = np.empty(capacity_bytes, dtype=np.uint8)
        # Gloo wants each to be held while it is under way.
        self._sent: collections.deque[Pending] = collections.deque(maxlen=max_frames)

    def send(self, frame: Frame, memory: PageMemory, block_ids: BlockIds, position: int) -> int:
        payload = self._staging[position : position + frame.payload_bytes]
        checksum = memory.copy_out(frame.slot, block_ids, frame.heads, payload)
        self._sent.append(self._group.send(payload))
        return checksum

    def close(self) -> None:
        self._sent.clear()
        self._group.close()


class _HostReceiving(HostCarrier):
    def __init__(self, group: PairGroup, max_payload_bytes: int) -> None:
        super().__init__("collective")
        self._group = group
        self._buffer: Bytes = np.empty(max_payload_bytes, dtype=np.uint8)

    def receive(self, frame: Frame) -> Bytes:
        payload = self._buffer[: frame.payload_bytes]
        self._group.receive(payload)
        return payload

    def close(self) -> None:
        self._group.close()


class _DeviceSending:
    """No byte is checksummed: none passes through a host."""

    def __init__(self, memory: DevicePages, group: DeviceGroup, capacity_bytes: int) -> None:
        self._group = group
        self._staging = memory.device.empty(capacity_bytes)

    def send(self, frame: Frame, memory: PageMemory, block_ids: BlockIds, position: int) -> int:
        assert isinstance(memory, DevicePages)
        payload = self._staging[position : position + frame.payload_bytes]
        memory.copy_to(payload, memory.page_numbers(frame.slot, block_ids), frame.heads)
        self._group.send(payload)
        return 0

    def close(self) -> None:
        self._group.close()


class _DeviceReceiving:
    def __init__(self, memory: DevicePages, group: DeviceGroup, max_payload_bytes: int) -> None:
        self._group = group
        self._buffer = memory.device.empty(max_payload_bytes)

    def receive(self, frame: Frame) -> torch.Tensor:
        payload = self._buffer[: frame.payload_bytes]
        self._group.receive(payload)
        return payload

    def copy_in(self, memory: PageMemory, arrivals: Sequence[Arrival[torch.Tensor]]) -> list[BatonError | None]:
        assert isinstance(memory, DevicePages)
        for arrival in arrivals:
            heads, num_pages = arrival.frame.heads, len(arrival.block_ids)
            rows = arrival.payload.view(num_pages, 2, heads.count, -1)
            numbers = memory.page_numbers(arrival.frame.slot, arrival.block_ids)
            memory.copy_from(rows, heads, [(np.arange(num_pages), numbers)], heads)
        return [None] * len(arrivals)

    def close(self) -> None:
        self._group.close()
