"""Servers under test: started from a command, waited for, measured as a whole tree of processes, and ended wholly.

Blocking; used from one thread. One server at a time is what a comparison needs, and nothing here relies on it.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import pathlib
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

import click
import psutil

from baton.errors import UnavailableError

HOST = "127.0.0.1"
BATON_SERVE = (
    *(sys.executable, "-P", "-m", "deploy.cli", "serve", "--model", "{model}"),
    *("--http-port", "{port}", "--grpc-port", "0"),
)
"""This installation's `baton serve`."""

KV_CACHE_GIB = 2
MAX_SEQS = 64

_PR_SET_PDEATHSIG = 1
# Loaded here: a new process should do as little as possible before it becomes the server.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_POLL_S = 0.05
_REQUEST_TIMEOUT_S = 5.0
_KILL_TIMEOUT_S = 10.0
_LOG_TAIL_LINES = 20
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")


@dataclasses.dataclass(frozen=True, slots=True)
class ServerSpec:
    """How to start a server.

    Attributes:
        name: what results call it.
        command: the words, in which {model} stands for the checkpoint's directory and {port} for the HTTP port.
        environment: added to this process's.
        ready_path: answers with 200 when the first request can be served.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ready_path: str = "/v1/models"

    def words(self, model: pathlib.Path, port: int) -> list[str]:
        """The command with its places filled in; other braces (JSON) stay as they are."""
        places = {"{model}": str(model), "{port}": str(port)}
        return [re.sub(r"\{(?:model|port)\}", lambda place: places[place[0]], word) for word in self.command]

    def shell_line(self) -> str:
        """The environment and the command as one would type them."""
        return shlex.join([*(f"{name}={value}" for name, value in self.environment.items()), *self.command])


def baton_preset(name: str, flags: tuple[str, ...] = ()) -> ServerSpec:
    """`baton serve` without Ray, one prefill and one decode worker, with the limits that `vllm_preset` has."""
    limits = ("--max-batch-seqs", str(MAX_SEQS), "--kv-cache-bytes", str(KV_CACHE_GIB << 30))
    environment = {"BATON_CACHE__ENABLE_PREFIX_CACHE": "false"}
    return ServerSpec(name, (*BATON_SERVE, "--runtime", "process", *limits, *flags), environment, "/ready")


def vllm_preset(name: str, flags: tuple[str, ...] = (), *, python: str) -> ServerSpec:
    """vLLM's OpenAI server on CPUs, run by the interpreter of its own virtual environment.

    Its own defaults decide on everything that is not here: chunked prefill (on), the size of a chunk, threads.
    """
    command = (
        *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", "{model}", "--host", HOST, "--port", "{port}"),
        *("--dtype", "bfloat16", "--max-num-seqs", str(MAX_SEQS), "--no-enable-prefix-caching"),
        *flags,
    )
    return ServerSpec(name, command, {"VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB)}, "/health")


def parse_server(text: str, *, peer_python: str | None = None) -> ServerSpec:
    """The server that `NAME=COMMAND` or a preset describes.

    A preset is `baton` or `vllm`, with further flags of that server after it, which win over the preset's. Before
    either there may be assignments to environment variables: `slim=OMP_NUM_THREADS=1 baton --block-size 32`.

    Args:
        peer_python: the interpreter that has vLLM.

    Raises:
        click.UsageError: it describes no server.
    """
    name, is_named, rest = text.partition("=")
    # Neither `baton --flag=1` nor `VARIABLE=1 baton` begins with a name.
    if not is_named or not _NAME.fullmatch(name):
        name, rest = "", text
    try:
        words = shlex.split(rest)
    except ValueError as error:
        raise click.UsageError(f"--server {text}: {error}") from error
    count = next((index for index, word in enumerate(words) if not _ASSIGNMENT.match(word)), len(words))
    environment = dict(word.split("=", 1) for word in words[:count])
    if count == len(words):
        raise click.UsageError(f"--server {text}: names no command and no preset")
    first, *flags = words[count:]
    # `baton serve …` is a command of its own.
    is_preset = not flags or flags[0].startswith("-")
    if is_preset and first == "baton":
        spec = baton_preset(name or first, tuple(flags))
    elif is_preset and first == "vllm":
        if peer_python is None:
            raise click.UsageError("--server vllm needs --peer-python, the interpreter that has vLLM")
        spec = vllm_preset(name or first, tuple(flags), python=peer_python)
    elif not name:
        raise click.UsageError(f"--server {text}: a command needs a name: NAME=COMMAND")
    else:
        spec = ServerSpec(name, (first, *flags))
    return dataclasses.replace(spec, environment={**spec.environment, **environment})


def free_port() -> int:
    """A TCP port of this host that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class Server:
    """One run of a server, started and ended with the context. In a session of its own, so that all of it can be found.

    Where this process is killed the server is asked to end as well.

    Args:
        log: where its stdout and stderr go.
        ready_timeout_s: most seconds from the start until it is ready.
        stop_timeout_s: seconds that SIGTERM gives it.
    """

    def __init__(
        self,
        spec: ServerSpec,
        model: pathlib.Path,
        log: pathlib.Path,
        *,
        ready_timeout_s: float = 900.0,
        stop_timeout_s: float = 30.0,
    ) -> None:
        self.spec = spec
        self.log = log
        self._port = free_port()
        self._words = spec.words(model, self._port)
        self._ready_timeout_s = ready_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._started_s = 0.0

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._port}"

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "not started"
        return self._process

    def start(self) -> None:
        """Starts the process and returns at once.

        Raises:
            UnavailableError: there is no such program.
        """
        self._started_s = time.monotonic()
        with self.log.open("wb") as log:
            try:
                self._process = subprocess.Popen(
                    self._words,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **self.spec.environment},
                    start_new_session=True,
                    preexec_fn=_end_with_parent,
                )
            except OSError as error:
                raise UnavailableError(f"{self.spec.name}: cannot start {self._words[0]}: {error.strerror}") from error

    def wait_ready(self) -> float:
        """Returns the seconds from the start until the first request could be served.

        Raises:
            UnavailableError: it ended, or was not ready in time; the message has the end of its log.
        """
        return self.wait_until(lambda: self._answers(self.spec.ready_path))

    def wait_until(self, is_ready: Callable[[], bool]) -> float:
        """As `wait_ready`, for another sign of readiness."""
        while not is_ready():
            exit_code = self.process.poll()
            if exit_code is not None:
                raise self._error(f"ended with exit status {exit_code} before it was ready")
            if self.elapsed_s > self._ready_timeout_s:
                raise self._error(f"was not ready in {self._ready_timeout_s:g} s")
            # It may answer at any moment; that it has ended is known at once.
            await_end(self.process.pid, _POLL_S)
        return self.elapsed_s

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started_s

    def version(self) -> str | None:
        """What the server's /version says; None where it has none."""
        with contextlib.suppress(OSError, ValueError):
            with urllib.request.urlopen(f"{self.url}/version", timeout=_REQUEST_TIMEOUT_S) as response:
                found = json.load(response)
            if isinstance(found, dict) and "version" in found:
                return str(found["version"])
        return None

    def processes(self) -> list[psutil.Process]:
        """Every living process of the server: its session, and what descends from its first process."""
        found = {process.pid: process for process in _descendants(self.process.pid)}
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getsid(process.pid) == self.process.pid:
                    found.setdefault(process.pid, process)
        return list(found.values())

    def cpu_seconds(self) -> float:
        """CPU seconds, user and system, of all living processes and of the children that these have waited for."""
        total = 0.0
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
        return total

    def rss_bytes(self) -> int:
        """Resident memory of all processes; on Linux pages that several share, as forked ones do, count once."""
        total = 0
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                usage = process.memory_full_info()
                total += getattr(usage, "pss", usage.rss)
        return total

    def stop(self) -> None:
        """Asks the first process to end in order, then kills what is left of the tree. Idempotent."""
        if self._process is None:
            return
        processes = self.processes()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(self._stop_timeout_s)
        # What has begun since, and what outlived its parent.
        left = {process.pid: process for process in (*processes, *self.processes())}
        for process in left.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        deadline_s = time.monotonic() + _KILL_TIMEOUT_S
        for pid in left:
            await_end(pid, max(0.0, deadline_s - time.monotonic()))

    def _answers(self, path: str) -> bool:
        """Whether `path` answers with 200."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=_REQUEST_TIMEOUT_S) as response:
                return bool(response.status == 200)
        except (OSError, ValueError):
            return False

    def _error(self, problem: str) -> UnavailableError:
        lines = self.log.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
        tail = "\n".join(f"  {line}" for line in lines) or "  (empty)"
        return UnavailableError(f"{self.spec.name}: {problem}; the end of {self.log}:\n{tail}")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def _end_with_parent() -> None:
    """In a new process: SIGTERM comes when its parent is gone, however that ended. Linux; elsewhere nothing."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def await_end(pid: int, timeout_s: float) -> None:
    """Waits until a process has ended, be it collected or not, but no longer than `timeout_s`."""
    with contextlib.suppress(ProcessLookupError):
        handle = os.pidfd_open(pid)
        try:
            select.select([handle], [], [], timeout_s)
        finally:
            os.close(handle)


def _descendants(pid: int) -> list[psutil.Process]:
    """A process and all below it that live."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
