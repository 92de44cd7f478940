"""The one place that reads the environment, and what worker processes are given in theirs."""

from __future__ import annotations

import os
import pathlib
import secrets
from collections.abc import Mapping, MutableMapping

from baton.config import numba_cache_dir


def worker_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of a worker: this one's, with what must be set before numba is imported."""
    return {**environ, "NUMBA_CACHE_DIR": numba_cache_dir(environ)}


def usable_cpus(environ: Mapping[str, str] = os.environ) -> int:
    """CPUs that this process may run on, but no more than OMP_NUM_THREADS where that is set."""
    count = len(os.sched_getaffinity(0))
    limit = environ.get("OMP_NUM_THREADS", "")
    return min(count, int(limit)) if limit.isdecimal() and int(limit) else count


def set_worker_environment() -> None:
    """Makes this process's environment a worker's: for a process that this program did not start (a Ray worker)."""
    os.environ.update(worker_environment())


def tracing_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What OpenTelemetry reads, for processes that do not inherit it."""
    return {name: value for name, value in environ.items() if name.startswith("OTEL_")}


def set_ray_authentication(environ: MutableMapping[str, str] = os.environ, *, joining: bool) -> None:
    """Sets what Ray is to do about its token where the user has not. Before ray is imported, which reads it once.

    A Ray that is for this process alone gets a token of its own: Ray would make one and keep it in the user's home,
    which may be read-only, and from then on ask for it in every cluster that is started there. A cluster that runs
    already is offered the token that is known here, which Ray itself does only for one that it finds by itself.

    Args:
        joining: whether a cluster is joined.
    """
    if environ.get("RAY_AUTH_MODE"):
        return
    known = environ.get("RAY_AUTH_TOKEN") or environ.get("RAY_AUTH_TOKEN_PATH")
    if not joining and not known:
        environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    elif joining and (known or (pathlib.Path.home() / ".ray" / "auth_token").is_file()):
        environ["RAY_AUTH_MODE"] = "token"


def quiet_grpc() -> None:
    """Keeps gRPC's notices about connections that end from stderr. Before grpc is imported."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
