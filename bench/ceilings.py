"""What this machine can do at most, measured beside what is compared with it. On as many threads as torch uses."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

COPY_BYTES = 256 << 20
_SIZES = (1024, 2048)


def best_seconds(run: Callable[[], object], rounds: int) -> float:
    """The shortest of `rounds` runs, after one that does not count: what it takes when nothing disturbs it."""
    run()
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def copy_bandwidth(rounds: int = 5) -> float:
    """Bytes per second read and written, together, by a copy between two large arrays.

    The faster of torch's copy and the C library's: the latter has one thread, but writes past the caches.
    """
    source, target = torch.ones(COPY_BYTES, dtype=torch.uint8), torch.empty(COPY_BYTES, dtype=torch.uint8)
    from_array, to_array = source.numpy(), target.numpy()
    torchs = best_seconds(lambda: target.copy_(source), rounds)
    librarys = best_seconds(lambda: np.copyto(to_array, from_array), rounds)
    return 2 * COPY_BYTES / min(torchs, librarys)


def gemm_rate(dtype: torch.dtype = torch.float32, rounds: int = 5) -> float:
    """FLOP per second of the best of a few square products."""

    def rate(size: int) -> float:
        a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
        return 2 * size**3 / best_seconds(lambda: a @ b, rounds)

    return max(rate(size) for size in _SIZES)
