"""SIGINT and SIGTERM as events: the first asks for an orderly end, the next for an immediate one."""

from __future__ import annotations

import asyncio
import signal
from types import TracebackType
from typing import Self


class StopSignals:
    """A context manager that handles both signals on the running loop of the main thread.

    Attributes:
        interrupted: whether the first was SIGINT.
    """

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self.forced = asyncio.Event()
        self.interrupted = False

    def __enter__(self) -> Self:
        self.take()
        return self

    def take(self) -> None:
        """Takes the signals over, also from a library that has put handlers of its own in place."""
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._received, number)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().remove_signal_handler(number)

    def _received(self, number: signal.Signals) -> None:
        if self.requested.is_set():
            self.forced.set()
        else:
            self.interrupted = number == signal.SIGINT
        self.requested.set()
