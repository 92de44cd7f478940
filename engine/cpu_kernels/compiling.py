"""How kernels are compiled: without the GIL, cached on disk, and most of them with fast math.

Fast math lets reductions vectorise and assumes that no infinity occurs. The cache folder is named after a digest of
this package's sources: numba checks a kernel's own file only and would miss a change in one it calls. Every
installation of the same sources, wherever it lies, uses the same folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import numba
from numba.core.caching import UserProvidedCacheLocator

from baton.config import numba_cache_dir

F = TypeVar("F", bound=Callable[..., Any])


def _source_digest() -> str:
    # Another version of numba would overwrite what this one has compiled.
    digest = hashlib.sha256(numba.__version__.encode())
    for file in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


class KernelLocator(UserProvidedCacheLocator):  # type: ignore[misc]
    """Where numba keeps what it compiled of a function: in the folder of the function's module.

    Numba's own locator names the folder after the path of the source file, and older versions distrust a file with
    another time stamp, so that every checkout would compile anew.
    """

    def __init__(self, function: Callable[..., Any], file: str) -> None:
        super().__init__(function, file)
        self._module = function.__module__

    def get_cache_path(self) -> str:
        return str(pathlib.Path(numba.config.CACHE_DIR, self._module))

    def get_source_stamp(self) -> str:
        return hashlib.sha256(pathlib.Path(self._py_file).read_bytes()).hexdigest()


# Numba picks a kernel's cache folder where it is declared, so this comes before the first one.
numba.config.CACHE_DIR = str(pathlib.Path(numba_cache_dir()) / _source_digest())
numba.config.CACHE_LOCATOR_CLASSES = f"{__name__}.{KernelLocator.__name__}"


@contextlib.contextmanager
def compiling_once() -> Iterator[None]:
    """Where the cache is empty yet, let one process compile; the others wait, and find what it has left there."""
    folder = pathlib.Path(numba.config.CACHE_DIR)
    done = folder / "compiled"
    with contextlib.ExitStack() as held:
        # A cache that cannot be written serves nobody else.
        with contextlib.suppress(OSError):
            if not done.exists():
                folder.mkdir(parents=True, exist_ok=True)
                fcntl.flock(held.enter_context(open(folder / "compiling", "wb")), fcntl.LOCK_EX)
        yield
        with contextlib.suppress(OSError):
            done.touch()


def kernel(function: F) -> F:
    """Compile at the first call, for the types of its arguments."""
    return cast(F, numba.njit(fastmath=True, nogil=True, cache=True, error_model="numpy")(function))


def exact_kernel(function: F) -> F:
    """Without fast math: sums in the order written, and infinities and NaN as IEEE 754 has them."""
    return cast(F, numba.njit(nogil=True, cache=True, error_model="numpy")(function))


def inlined_kernel(function: F) -> F:
    """Paste the function into the kernels that call it, which then compile it; for the innermost loops."""
    return cast(F, numba.njit(inline="always")(function))


def parallel_kernel(function: F) -> F:
    """The same, with the iterations of `numba.prange` spread over threads; see `engine.cpu_kernels.threads`.

    Where numba's OpenMP layer is missing they stay on the calling thread: its other layers may not be entered by two
    threads at once, such as those of two engines in one process.
    """
    return cast(
        F,
        numba.njit(fastmath=True, nogil=True, cache=True, error_model="numpy", parallel=has_openmp())(function),
    )


@functools.cache
def has_openmp() -> bool:
    """Whether numba's OpenMP layer loads: it needs the system's libgomp."""
    try:
        importlib.import_module("numba.np.ufunc.omppool")
    except ImportError:
        return False
    return True
