"""What a result was measured on and with: the machine, the software, the time and the command line."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import pathlib
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from typing import Self

import psutil

import baton

PACKAGES = ("torch", "transformers", "grpcio", "numba")
_REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
_CPU_MODEL = re.compile(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", re.MULTILINE)
_TIMEOUT_S = 10.0


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    """Where it ran. `num_cores` are those that this process may use; `gpus` are those that nvidia-smi lists."""

    cpu: str
    num_cores: int
    memory_bytes: int
    gpus: tuple[str, ...]

    @classmethod
    def here(cls) -> Self:
        return cls(_cpu_model(), len(psutil.Process().cpu_affinity()), psutil.virtual_memory().total, _gpus())


@dataclasses.dataclass(frozen=True, slots=True)
class Provenance:
    """What stands beside every result.

    Attributes:
        versions: of Baton and of each installed package that was asked for.
        git_commit: of this checkout; None where Baton is installed otherwise.
        git_is_dirty: whether tracked files differ from that commit; None without one.
        measured_at: UTC, ISO 8601.
        command: what was typed, quoted for a shell.
    """

    machine: Machine
    os: str
    python: str
    versions: dict[str, str]
    git_commit: str | None
    git_is_dirty: bool | None
    measured_at: str
    command: str

    @classmethod
    def collect(cls, *, packages: Iterable[str] = ()) -> Self:
        """Everything about this process; `packages` are installed ones to name beside `PACKAGES`."""
        commit = _git("rev-parse", "HEAD")
        changes = None if commit is None else _git("status", "--porcelain", "--untracked-files=no")
        return cls(
            machine=Machine.here(),
            os=platform.platform(),
            python=platform.python_version(),
            versions={"baton": baton.__version__, **_versions((*PACKAGES, *packages))},
            git_commit=commit,
            git_is_dirty=None if changes is None else bool(changes),
            measured_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            command=shlex.join([pathlib.Path(sys.argv[0]).name, *redacted(sys.argv[1:])]),
        )


def redacted(arguments: Iterable[str]) -> list[str]:
    """Command-line arguments with the value of --api-key left out."""
    shown: list[str] = []
    for argument in arguments:
        hides = bool(shown) and shown[-1] == "--api-key"
        shown.append("***" if hides else re.sub(r"^(--api-key=).*", r"\1***", argument))
    return shown


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu_model() -> str:
    """As the kernel names it, else the architecture."""
    try:
        match = _CPU_MODEL.search(pathlib.Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()


def _gpus() -> tuple[str, ...]:
    """Name and memory of each GPU; nothing where there is no driver. Loading torch for it would take seconds."""
    listed = _output(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"])
    return tuple((listed or "").splitlines())


def _git(*arguments: str) -> str | None:
    """What git says of this checkout; None where it is none (a checkout that merely contains it does not count)."""
    if not (_REPOSITORY / ".git").exists():
        return None
    return _output(["git", "-C", str(_REPOSITORY), *arguments])


def _output(command: list[str]) -> str | None:
    """What a program prints; None where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_TIMEOUT_S).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
