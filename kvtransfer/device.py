"""What a pool needs of the device that it lies on: a GPU's is `CudaDevice`, and tests have one without a GPU."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store


class Mark(Protocol):
    """What a device had been given to do at some moment."""

    def query(self) -> bool:
        """Whether it has been done."""

    def synchronize(self) -> None:
        """Waits until it has been done, without the GIL."""


class Stream(Protocol):
    """Does what it is given in order, beside other streams; used by one thread at a time."""

    def work(self) -> AbstractContextManager[None]:
        """What is begun within goes to this stream, and has been done when the context ends."""


class Mapping(Protocol):
    """Memory of another process.

    Attributes:
        memory: uint8 [n], until it is closed.
    """

    memory: torch.Tensor

    def close(self) -> None:
        """Nothing may use the memory any more. Idempotent."""


class DeviceGroup(Protocol):
    """One of two ends, between which payloads pass from memory to memory. Used by one thread."""

    def send(self, payload: torch.Tensor) -> None:
        """Begins to send uint8 [n] of the device, which must stay as it is until the other end has received it.

        Raises:
            UnavailableError: the other end is gone.
        """

    def receive(self, into: torch.Tensor) -> None:
        """Waits for what the other end sends next, uint8 [n] of the device.

        Raises:
            UnavailableError: it is gone, or sent nothing in time.
        """

    def close(self) -> None:
        """Ends what is under way. Idempotent."""


class Device(Protocol):
    """
    Attributes:
        uuid: equal in all processes that use it, and in no other device.
        has_groups: whether it can have a `group` with another device.
    """

    uuid: str
    has_groups: bool

    def mark(self) -> Mark:
        """What the calling thread has given its current stream so far."""

    def stream(self) -> Stream:
        """A new one."""

    def empty(self, num_bytes: int) -> torch.Tensor:
        """Memory of the device that nothing uses any more, on any stream: uint8 [num_bytes]."""

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """Memory of the host that the device itself reads and writes, uint8 [num_bytes]."""

    def copy_pages(
        self,
        source: torch.Tensor,
        source_pages: torch.Tensor | None,
        target: torch.Tensor,
        target_pages: torch.Tensor | None,
    ) -> None:
        """Begins what `engine.kernels.pages.copy_pages` does."""

    def group(self, store: Store, rank: int, timeout_s: float) -> DeviceGroup:
        """Joins another device; blocks until that has joined too.

        Args:
            store: what the two have in common already.
            rank: 0 for the sender, 1 for the receiver.
            timeout_s: longest wait for the other end, and for one payload.

        Raises:
            UnavailableError: the two cannot, or not in time.
        """

    def export(self, memory: torch.Tensor) -> bytes:
        """A handle by which other processes of the host can map contiguous memory of the device, while it lives.

        Raises:
            OSError: it cannot be shared.
        """

    def open(self, handle: bytes) -> Mapping:
        """Maps what another process has exported.

        Raises:
            OSError: this device cannot read it.
            ValueError: the handle is none.
        """
