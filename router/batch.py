"""Writes that leave together: all that one step of a decode worker brings is computed before any of it is sent.

A write wakes the client up, and where cores are few the client runs at once, in between: a router that writes each
token as it goes finds its caches cold for the next one, which makes everything that it does a third slower.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

_log = logging.getLogger(__name__)


class WriteBatch:
    """Calls what it is given when the event loop is through with what it does now; belongs to the loop."""

    def __init__(self) -> None:
        self._calls: list[Callable[[], None]] = []

    def add(self, call: Callable[[], None]) -> None:
        """In the order in which they were added; one that raises keeps no other from being called."""
        if not self._calls:
            asyncio.get_running_loop().call_soon(self._flush)
        self._calls.append(call)

    def _flush(self) -> None:
        calls, self._calls = self._calls, []
        for call in calls:
            try:
                call()
            except Exception:
                _log.exception("a write failed")
