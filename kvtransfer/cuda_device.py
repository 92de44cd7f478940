"""A GPU as a pool needs it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from engine.kernels.pages import copy_pages
from kvtransfer import nccl
from kvtransfer.cuda_ipc_memory import IpcMapping, export_memory
from kvtransfer.device import DeviceGroup, Mapping, Mark, Stream

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store


class CudaDevice:
    """`Device` by torch."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.uuid = str(torch.cuda.get_device_properties(device).uuid)
        self.has_groups = nccl.is_available()

    def mark(self) -> Mark:
        # Threads that wait for it sleep.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def stream(self) -> Stream:
        return _CudaStream(self._device)

    def empty(self, num_bytes: int) -> torch.Tensor:
        memory = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        # Torch gives out what was freed on the current stream without waiting for what that may still do with it.
        self.mark().synchronize()
        return memory

    def pinned(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def copy_pages(
        self,
        source: torch.Tensor,
        source_pages: torch.Tensor | None,
        target: torch.Tensor,
        target_pages: torch.Tensor | None,
    ) -> None:
        copy_pages(source, source_pages, target, target_pages)

    def group(self, store: Store, rank: int, timeout_s: float) -> DeviceGroup:
        return nccl.NcclGroup(store, rank, self._device, timeout_s)

    def export(self, memory: torch.Tensor) -> bytes:
        return export_memory(memory)

    def open(self, handle: bytes) -> Mapping:
        return IpcMapping(handle, self._device)


class _CudaStream:
    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # Copies are short, so whoever waits for one spins.
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def work(self) -> Iterator[None]:
        # A thread begins with the first GPU, and the stream's end alone would go back to it and make a context there.
        with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
            try:
                yield
            finally:
                self._done.record(self._stream)
                self._done.synchronize()
