"""Times work on the current GPU, and what it can do at most: copies and matrix products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from triton.testing import do_bench

COPY_BYTES = 4 << 30
_GEMM_SIZES = (4096, 8192)
_REPEAT_MS = 60


def seconds(run: Callable[[], object]) -> float:
    """The median of many runs by the GPU's events, its cache emptied before each."""
    milliseconds: float = do_bench(run, rep=_REPEAT_MS, return_mode="median")
    return milliseconds / 1e3


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written together, of a copy between two large arrays."""
    source = torch.randint(0, 256, (COPY_BYTES,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / seconds(lambda: target.copy_(source))


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of the best of a few square products of random numbers."""

    def rate(size: int) -> float:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        return 2 * size**3 / seconds(lambda: a @ b)

    return max(rate(size) for size in _GEMM_SIZES)
