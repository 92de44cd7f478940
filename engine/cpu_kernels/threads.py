"""How many threads kernels run on: as many as torch uses at the time, on torch's own pool (see `engine`)."""

from __future__ import annotations

import numba
import torch

from engine.cpu_kernels.compiling import has_openmp

_MAX_THREADS: int = numba.config.NUMBA_NUM_THREADS if has_openmp() else 1
if has_openmp():
    numba.config.THREADING_LAYER = "omp"


def use_threads() -> int:
    """Make parallel kernels that this thread calls next run on as many threads as torch uses, and say how many."""
    of_torch = torch.get_num_threads()
    num_threads = min(of_torch, _MAX_THREADS)
    numba.set_num_threads(num_threads)
    # The first time that starts numba's threads, by which the calling thread's number of OpenMP's, and so torch's,
    # becomes that of all cores.
    if torch.get_num_threads() != of_torch:
        torch.set_num_threads(of_torch)
    return num_threads
