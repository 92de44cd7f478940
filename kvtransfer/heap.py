"""Makes the C library keep the memory of freed messages.

gRPC allocates each message anew, and glibc returns anything as large to the kernel when it is freed: then every page of
every message is faulted in and cleared again, which takes longer than all copies of it together.
"""

from __future__ import annotations

import ctypes
import functools

# From malloc.h. Setting either also ends glibc's own adjustments of both.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Allocations below this come from the heap; the largest value that glibc takes.
_MMAP_THRESHOLD_BYTES = 32 << 20
# Free memory at the top of a heap beyond which it is given back.
_TRIM_THRESHOLD_BYTES = 256 << 20


@functools.cache
def keep_freed_memory() -> None:
    """Sets it for the whole process, once; with another C library than glibc nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES)
