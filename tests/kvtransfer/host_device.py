"""A device without a GPU: its memory is the host's, what it is given is done at once, and its handles are real.

Memory that is to be exported lies in files without a name, which other processes open through the one that has them.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
import threading
from typing import Any

import numpy as np
import torch

from baton.errors import UnavailableError
from kvtransfer.device_pages import DevicePages
from kvtransfer.pages import HeadRange

_HANDLE = struct.Struct("<IIQ")


class OpenMark:
    """Done when a test says so."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.waited_for = threading.Event()

    def query(self) -> bool:
        return self.done.is_set()

    def synchronize(self) -> None:
        self.waited_for.set()
        self.done.wait()


class HostDevice:
    """`Device`, in a process of its own or together with others.

    Attributes:
        marks: each that was made; all are done unless `computes` is set.
        gate, entered: once the gate is shut, copies wait before they begin, until it opens.
    """

    def __init__(self, uuid: str = "GPU-of-the-host") -> None:
        self.uuid = uuid
        self.computes = False
        self.marks: list[OpenMark] = []
        self.num_launches = 0
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.has_groups = True
        self._files: dict[int, int] = {}

    def share(self, array: np.ndarray) -> np.ndarray:
        """A copy of the array that can be exported."""
        descriptor = os.memfd_create("baton-device")
        os.truncate(descriptor, array.nbytes)
        shared = np.frombuffer(mmap.mmap(descriptor, array.nbytes), dtype=array.dtype).reshape(array.shape)
        shared[:] = array
        self._files[shared.ctypes.data] = descriptor
        return shared

    def __del__(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    def mark(self) -> OpenMark:
        mark = OpenMark()
        if not self.computes:
            mark.done.set()
        self.marks.append(mark)
        return mark

    def stream(self) -> HostDevice:
        return self

    def work(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def empty(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    pinned = empty

    def copy_pages(
        self,
        source: torch.Tensor,
        source_pages: torch.Tensor | None,
        target: torch.Tensor,
        target_pages: torch.Tensor | None,
    ) -> None:
        self.num_launches += 1
        if not self.gate.is_set():
            self.entered.release()
            self.gate.wait()
        rows = source if source_pages is None else source[source_pages]
        if target_pages is None:
            target[: len(rows)] = rows
        else:
            target[target_pages] = rows[: len(target_pages)]

    def group(self, store: Any, rank: int, timeout_s: float) -> HostGroup:
        return HostGroup(store, rank, timeout_s)

    def export(self, memory: torch.Tensor) -> bytes:
        if memory.data_ptr() not in self._files:
            raise OSError("this memory cannot be shared")
        return _HANDLE.pack(os.getpid(), self._files[memory.data_ptr()], memory.nbytes) + self.uuid.encode()

    def open(self, handle: bytes) -> HostMapping:
        if len(handle) < _HANDLE.size:
            raise ValueError("this is no handle")
        uuid = handle[_HANDLE.size :].decode()
        if uuid != self.uuid:
            raise OSError(f"{self.uuid} cannot read {uuid}")
        pid, descriptor, num_bytes = _HANDLE.unpack_from(handle)
        return HostMapping(f"/proc/{pid}/fd/{descriptor}", num_bytes)


class HostGroup:
    """A pair of sockets."""

    num_made = 0

    def __init__(self, store: Any, rank: int, timeout_s: float) -> None:
        HostGroup.num_made += 1
        if rank == 0:
            with socket.create_server(("127.0.0.1", 0)) as server:
                server.settimeout(timeout_s)
                store.set("port", str(server.getsockname()[1]).encode())
                self._socket, _ = server.accept()
        else:
            self._socket = socket.create_connection(("127.0.0.1", int(store.get("port"))), timeout_s)

    def send(self, payload: torch.Tensor) -> None:
        self._socket.sendall(payload.numpy().data)

    def receive(self, into: torch.Tensor) -> None:
        if self._socket.recv_into(into.numpy().data, len(into), socket.MSG_WAITALL) < len(into):
            raise UnavailableError("the other end is gone")

    def close(self) -> None:
        self._socket.close()


class HostMapping:
    num_open = 0

    def __init__(self, path: str, num_bytes: int) -> None:
        with open(path, "r+b") as file:
            mapped = mmap.mmap(file.fileno(), num_bytes)
        self.memory = torch.from_numpy(np.frombuffer(mapped, dtype=np.uint8))
        self._is_open = True
        HostMapping.num_open += 1

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            HostMapping.num_open -= 1


def device_pages(pages: np.ndarray, heads: HeadRange, device: HostDevice) -> DevicePages:
    """Memory of `device` over uint8 [num_slots, num_blocks, page_bytes]."""
    pool = torch.from_numpy(pages).view(*pages.shape[:2], 2, heads.count, 1, -1)
    return DevicePages(pool, heads, device)
