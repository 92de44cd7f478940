"""The processes of the benchmark: each ends with the context that started it, and tells its own CPU time and memory."""

from __future__ import annotations

import contextlib
import json
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

import psutil

from baton.config import DecodeConfig, LogConfig, ModelConfig, RouterConfig, RouterProcessConfig, TransferConfig
from baton.errors import InternalError
from bench.checkpoint import BOS_ID, EOS_ID, make_tokenizer

VOCAB_SIZE = 1024
# Of the kernel's include/linux/posix-timers.h.
_CPUCLOCK_SCHED = 2
MODEL = "mock"


class Child:
    """A Python module in a process of its own that speaks in lines."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            # -P: a folder named like one of our packages in the working directory must not be taken for it.
            [sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._module = module
        self._usage = psutil.Process(self._process.pid)

    @property
    def pid(self) -> int:
        return self._process.pid

    def read_line(self) -> str:
        """The next line it says; InternalError where it has ended."""
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise InternalError(f"{self._module} ended with exit status {self._process.wait()}")
        return line.strip()

    def ask(self, line: str) -> str:
        """Writes a line and waits for the one that answers it."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self.read_line()

    def cpu_s(self) -> float:
        """Seconds of CPU that all its threads have used, to the nanosecond.

        psutil counts in ticks of 10 ms. The clock is the one that Linux's clock_getcpuclockid(3) names for a process.
        """
        return time.clock_gettime(~self.pid << 3 | _CPUCLOCK_SCHED)

    def rss_bytes(self) -> int:
        """Its resident memory."""
        return int(self._usage.memory_info().rss)

    def stop(self) -> None:
        """Ends it, in order where it can."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


@contextlib.contextmanager
def running(module: str, *arguments: str) -> Iterator[Child]:
    """A child for as long as the context lasts."""
    child = Child(module, *arguments)
    try:
        yield child
    finally:
        child.stop()


class Addresses(NamedTuple):
    """Where the router listens, as its process tells it."""

    grpc: str
    http: str


@contextlib.contextmanager
def running_router(membership: str) -> Iterator[tuple[Child, Addresses]]:
    """`python -m router`, as `baton serve` runs it, ready to serve what the workers of `membership` have."""
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        path = pathlib.Path(folder)
        write_model(path)
        config = RouterProcessConfig(
            model=ModelConfig(path=folder, served_name=MODEL),
            router=RouterConfig(grpc_port=0, http_port=0),
            # Every prompt goes through a prefill worker, however short.
            decode=DecodeConfig(local_prefill_tokens=0, backlog_prefill_tokens=0),
            transfer=TransferConfig(),
            log=LogConfig(level="warning"),
            membership_address=membership,
        )
        config_path = path / "router.json"
        config_path.write_text(config.model_dump_json())
        with running("router", str(config_path)) as child:
            listening = json.loads(child.read_line())
            ready = json.loads(child.read_line())
            assert ready == {"ready": True}, ready
            yield child, Addresses(listening["grpc"], listening["http"])


def write_model(folder: pathlib.Path) -> None:
    """What the router reads of a checkpoint: a real tokenizer, and a config without weights."""
    make_tokenizer(VOCAB_SIZE, seed=0).save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["MockForCausalLM"],
        "vocab_size": VOCAB_SIZE,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
    }
    (folder / "config.json").write_text(json.dumps(config))
