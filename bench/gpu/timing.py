"""Times work on a device, and what that can do at most: copies and matrix products."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from triton.testing import do_bench

from bench import ceilings

COPY_BYTES = 4 << 30
_GEMM_SIZES = (4096, 8192)
_REPEAT_MS = 60


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one run: on a GPU the median of many by its events, its cache emptied before each; on a CPU the best of 3."""
    if device.type == "cpu":
        return ceilings.best_seconds(run, 3)
    milliseconds: float = do_bench(run, rep=_REPEAT_MS, return_mode="median")
    return milliseconds / 1e3


def mean_seconds(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Of one of `rounds` runs that are launched one after another, so that a GPU need not wait for the host; after two
    that do not count, in which kernels are compiled and graphs captured."""
    for _ in range(2):
        run()
    synchronize(device)
    started_s = time.perf_counter()
    for _ in range(rounds):
        run()
    synchronize(device)
    return (time.perf_counter() - started_s) / rounds


def synchronize(device: torch.device) -> None:
    """Waits for what was launched on a GPU; a CPU has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written together, of a copy between two large arrays."""
    if device.type == "cpu":
        return ceilings.copy_bandwidth(3)
    source = torch.randint(0, 256, (COPY_BYTES,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / seconds(lambda: target.copy_(source), device)


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of the best of a few square products of random numbers."""
    if device.type == "cpu":
        return ceilings.gemm_rate(dtype, 3)

    def rate(size: int) -> float:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        return 2 * size**3 / seconds(lambda: a @ b, device)

    return max(rate(size) for size in _GEMM_SIZES)
