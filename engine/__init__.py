"""The engine: model, paged KV cache, attention and sampling on torch.

It imports neither grpc nor ray, so the same engine runs in a test, a Ray actor or a bare process.
"""

import contextlib

# Before torch: torch then takes the OpenMP library that numba's layer has loaded, the system's, for its own copy. With
# two of them a process has two pools of threads, and those of one spin for work on the cores that the other needs.
with contextlib.suppress(ImportError):
    import numba.np.ufunc.omppool  # noqa: F401
