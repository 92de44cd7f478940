"""Cores of their own for the two processes of a transfer, as two hosts or two pinned workers have them.

Left to itself the scheduler often wakes one end on the core of the other, where they take turns instead of overlapping.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator


def halves() -> tuple[Collection[int], Collection[int]]:
    """The cores of this process in two halves; the same one twice where there is no second."""
    cores = sorted(os.sched_getaffinity(0))
    middle = len(cores) // 2
    return cores[:middle] or cores, cores[middle:]


@contextlib.contextmanager
def on_cores(cores: Collection[int]) -> Iterator[None]:
    """Keeps this thread, and the threads and processes that it starts meanwhile, to `cores`."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
