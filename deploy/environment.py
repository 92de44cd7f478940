"""The one place that reads the environment, and what worker processes are given in theirs."""

from __future__ import annotations

import os
from collections.abc import Mapping

from baton.config import numba_cache_dir


def worker_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of a worker: this one's, with what must be set before numba is imported."""
    return {**environ, "NUMBA_CACHE_DIR": numba_cache_dir(environ)}


def set_worker_environment() -> None:
    """Makes this process's environment a worker's: for a process that this program did not start (a Ray worker)."""
    os.environ.update(worker_environment())


def quiet_grpc() -> None:
    """Keeps gRPC's notices about connections that end from stderr. Before grpc is imported."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
