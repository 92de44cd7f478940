"""What passes between the host and the engine's device.

Small arrays go together, in one copy that nobody waits for. Copies go through pinned memory, without which they would
stop the host until the device has come to them. Torch's allocator of pinned memory keeps a buffer until the copies that
read it are through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

# Where each array begins; any element's size divides it.
_ALIGNMENT = 16

Array = npt.NDArray[Any]


class Packing:
    """How arrays of given shapes and dtypes lie one behind the other.

    Attributes:
        num_bytes: all together.
    """

    def __init__(self, arrays: Sequence[Array]) -> None:
        """`arrays` show the shapes and dtypes."""
        self._parts: list[tuple[int, int, torch.dtype, tuple[int, ...]]] = []
        offset = 0
        for array in arrays:
            dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
            self._parts.append((offset, offset + array.nbytes, dtype, array.shape))
            offset = -(-(offset + array.nbytes) // _ALIGNMENT) * _ALIGNMENT
        self.num_bytes = offset

    def pack(self, arrays: Sequence[Array], *, pinned: bool) -> torch.Tensor:
        """A copy of the arrays on the host, uint8 [num_bytes]; what lies between them is undefined."""
        packed = torch.empty(self.num_bytes, dtype=torch.uint8, pin_memory=pinned)
        for view, array in zip(self.views(packed), arrays, strict=True):
            view.numpy()[...] = array
        return packed

    def views(self, packed: torch.Tensor) -> list[torch.Tensor]:
        """The arrays in `packed`, uint8 [num_bytes] of any device; they share its memory."""
        return [packed[start:end].view(dtype).view(shape) for start, end, dtype, shape in self._parts]


def to_device(arrays: Sequence[Array], device: torch.device) -> list[torch.Tensor]:
    """Arrays as tensors of `device`, in the order of its current stream; on the host they share the arrays' memory."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    packing = Packing(arrays)
    return packing.views(packing.pack(arrays, pinned=True).to(device, non_blocking=True))


class Fetch:
    """Tensors of a device that are being copied to the host, in the order of its current stream."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors
        self._done: torch.cuda.Event | None = None
        if any(tensor.is_cuda for tensor in tensors):
            self._tensors = [
                torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
                for tensor in tensors
            ]
            self._done = sleeping_event()
            self._done.record()

    def wait(self) -> Sequence[torch.Tensor]:
        """The tensors on the host, once they are there."""
        if self._done is not None:
            self._done.synchronize()
        return self._tensors


def sleeping_event() -> torch.cuda.Event:
    """Whoever waits for it sleeps, instead of asking over and over."""
    return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
