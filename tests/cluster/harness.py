"""Real clusters for tests: started by the real command, and checked to leave nothing behind."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import sys
import uuid
from collections.abc import Iterator, Sequence
from typing import Literal

import psutil

from baton.client import Client
from deploy.local_cluster import SERVE, LocalCluster

SHARED_MEMORY = pathlib.Path("/dev/shm")
MARK = "BATON_TEST_CLUSTER"
END_TIMEOUT_S = 20.0


class ClusterUnderTest(LocalCluster):
    """A cluster whose processes carry a mark, so that they are found whatever became of their parents."""

    def __init__(
        self,
        model: str | os.PathLike[str],
        *arguments: str,
        runtime: Literal["process", "ray"] = "process",
        prefill_workers: int = 1,
        decode_workers: int = 1,
        command: Sequence[str] = SERVE,
        stderr: int | None = None,
    ) -> None:
        self._mark = uuid.uuid4().hex
        self._segments = shared_memory()
        counts = ["--prefill-workers", str(prefill_workers), "--decode-workers", str(decode_workers)]
        super().__init__(
            model,
            *("--runtime", runtime, *counts, *arguments),
            command=command,
            environment={MARK: self._mark, "OMP_NUM_THREADS": "1"},
            stderr=stderr,
        )
        # What a killed cluster leaves there goes with this object.
        self._environment["TMPDIR"] = self._folder.name

    def processes(self) -> list[psutil.Process]:
        """Every process of this cluster that lives, `baton serve` included."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def assert_nothing_left(self) -> None:
        """Waits a moment for every process to end, then looks for processes and shared memory."""
        _, alive = psutil.wait_procs(self.processes(), timeout=END_TIMEOUT_S)
        left = [str(process) for process in alive]
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        assert left == []
        # Others may have come and be in use by other tests; a segment's name has the process that made it.
        assert not [name for name in shared_memory() - self._segments if not psutil.pid_exists(_maker(name))]

    def kill(self) -> None:
        """Kills the command, checks that nothing is left whatever it was doing, and closes."""
        try:
            self.process.kill()
            self.process.wait()
            self.assert_nothing_left()
        finally:
            self.close()

    def _is_ours(self, process: psutil.Process) -> bool:
        # Read raw: psutil takes an environment for empty once the process has written its title over its beginning, as
        # Ray's do. A zombie has none.
        try:
            return f"{MARK}={self._mark}".encode() in pathlib.Path(f"/proc/{process.pid}/environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            return False


@contextlib.contextmanager
def running_cluster(
    model: str | os.PathLike[str],
    *arguments: str,
    runtime: Literal["process", "ray"] = "process",
    prefill_workers: int = 1,
    decode_workers: int = 1,
    stderr: int | None = None,
) -> Iterator[ClusterUnderTest]:
    """A cluster with every worker up; at the end SIGTERM must make it exit with 0 and leave nothing."""
    cluster = ClusterUnderTest(
        model,
        *arguments,
        runtime=runtime,
        prefill_workers=prefill_workers,
        decode_workers=decode_workers,
        stderr=stderr,
    )
    cluster.start()
    try:
        cluster.wait_ready()
        cluster.wait_complete()
        yield cluster
        assert cluster.stop() == 0
    finally:
        cluster.kill()


def assert_sigterm_lets_a_stream_end(cluster: ClusterUnderTest, client: Client) -> None:
    """Sends SIGTERM in the middle of an answer, which must come whole, from two workers."""
    stream = client.stream(list(range(3, 67)), max_tokens=200, temperature=0, ignore_eos=True)
    next(stream)
    cluster.process.send_signal(signal.SIGTERM)
    *_, last = stream
    assert last.usage is not None
    assert last.usage.completion_tokens == 200
    assert last.timings is not None
    assert last.timings.prefill_worker.startswith("prefill-")
    assert last.timings.decode_worker == "decode-0"


def _maker(segment: str) -> int:
    """The process that made baton-kv-PID-..."""
    return int(segment.split("-")[2])


def shared_memory() -> set[str]:
    """Names of Baton's segments that exist now."""
    return {path.name for path in SHARED_MEMORY.glob("*baton*")} if sys.platform == "linux" else set()
