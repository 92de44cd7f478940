"""A program in a pseudo-terminal: typed at, and read, as a person would."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

TIMEOUT_S = 30.0
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]")


class Terminal:
    """Starts with the context; the program is killed at its end if it still runs.

    Attributes:
        text: what the program has shown so far, without colours and cursor movements.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._command = command
        self._environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", **(environment or {})}
        self.text = ""

    def read_until(self, expected: str) -> str:
        """Returns what was shown up to and with `expected`, and forgets it."""
        while expected not in self.text:
            ready, _, _ = select.select([self._ours], [], [], TIMEOUT_S)
            assert ready, f"no {expected!r} in {self.text!r}"
            self.text += _ESCAPES.sub("", os.read(self._ours, 65536).decode(errors="replace")).replace("\r\n", "\n")
        shown, self.text = self.text.split(expected, 1)
        return shown + expected

    def write(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def interrupt_until(self, expected: str) -> str:
        """Interrupts until the program shows `expected`.

        One that comes while Python's readline handles a key is not heard before the next key: readline asks for signals
        only where one has ended its wait for input.
        """
        for _ in range(int(TIMEOUT_S)):
            self.interrupt()
            if select.select([self._ours], [], [], 1.0)[0]:
                return self.read_until(expected)
        raise AssertionError(f"no {expected!r} after interrupts")

    def wait(self) -> int:
        """The exit status."""
        return self._process.wait(TIMEOUT_S)

    def __enter__(self) -> Self:
        self._ours, theirs = pty.openpty()
        self._process = subprocess.Popen(
            self._command, stdin=theirs, stdout=theirs, stderr=theirs, env=self._environment, start_new_session=True
        )
        os.close(theirs)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._ours)
