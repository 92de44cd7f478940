"""`baton serve` as another program runs it: a process of its own on free ports, found through its ready file."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO, Any, Self

from deploy.errors import ClusterError

SERVE = (sys.executable, "-P", "-m", "deploy.cli", "serve")


class LocalCluster:
    """Starts with the context and stops with it. Blocking; used from one thread.

    Args:
        model: the checkpoint's directory.
        arguments: further flags.
        command: what is run before the flags.
        environment: added to this process's.
        stderr: where the steps go, as for subprocess; None shares this process's stderr.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *arguments: str,
        command: Sequence[str] = SERVE,
        environment: Mapping[str, str] | None = None,
        stderr: int | IO[str] | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="baton-", ignore_cleanup_errors=True)
        self._ready_file = pathlib.Path(self._folder.name, "ready.json")
        flags = ["--model", os.fspath(model), "--grpc-port", "0", "--http-port", "0"]
        self._command = [*command, *flags, "--ready-file", str(self._ready_file), *arguments]
        self._environment = {**os.environ, **(environment or {})}
        self._stderr = stderr
        self._process: subprocess.Popen[str] | None = None

    @property
    def process(self) -> subprocess.Popen[str]:
        assert self._process is not None, "not started"
        return self._process

    @property
    def description(self) -> Any:
        """What the ready file says now."""
        return json.loads(self._ready_file.read_text())

    @property
    def target(self) -> str:
        """The router's gRPC address."""
        return str(self.description["grpc"])

    @property
    def url(self) -> str:
        """The router's HTTP address."""
        return str(self.description["http"])

    def start(self) -> None:
        """Starts the process and returns at once."""
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=self._environment,
            text=True,
        )

    def wait_ready(self) -> None:
        """Returns when the first request can be served."""
        self._wait_line("ready in ")

    def wait_complete(self) -> None:
        """Returns when every worker has come up. Called after `wait_ready`, once."""
        self._wait_line("all ")

    def stop(self) -> int:
        """Asks for an orderly end if it still runs, and returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        exit_code = self.process.wait()
        self.close()
        return exit_code

    def close(self) -> None:
        """Kills what still runs and gives back what this object holds. Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdout, self._process.stderr):
                if stream is not None:
                    stream.close()
        self._folder.cleanup()

    def _wait_line(self, beginning: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(beginning):
                return
        raise ClusterError(f"baton serve ended with exit status {self.process.wait()}")

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
