"""Refuses grammars that cannot be followed before anything is reserved for their requests."""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from collections.abc import Callable
from concurrent.futures import Future

from baton.errors import InvalidRequestError
from baton.grammar import GrammarThreads, check_grammar, in_time
from baton.requests import Grammar

# Clients send the same few again and again.
_MAX_KNOWN = 256
# What is wrong with a grammar stays wrong, but what took too long may have had bad luck.
_REMEMBERS_FAILURES_S = 60.0


class GrammarCheck:
    """Used by the intake on the event loop; the checking itself runs in a thread, once for all who ask meanwhile.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._threads = GrammarThreads(1)
        self._known: collections.OrderedDict[Grammar, _Verdict] = collections.OrderedDict()
        self._running: dict[Grammar, _Running] = {}

    async def check(self, grammar: Grammar) -> None:
        """Returns where the grammar can be followed.

        Raises:
            InvalidRequestError: the grammar is not valid, or takes too long.
            UnavailableError: it could not be checked, since others take long.
        """
        self._collect()
        if (verdict := self._known.get(grammar)) is not None and self._clock() < verdict.until:
            self._known.move_to_end(grammar)
            verdict.tell()
            return
        running = self._running.get(grammar)
        if running is None:
            running = self._running[grammar] = _Running(self._threads.submit(check_grammar, grammar))
        running.num_waiting += 1
        try:
            await in_time(running.future)
        finally:
            running.num_waiting -= 1
            if not running.num_waiting:
                # One that has begun goes on; what it finds is for whoever asks next.
                running.future.cancel()
            self._collect()

    def close(self) -> None:
        self._threads.close()

    def _collect(self) -> None:
        """Remembers what the checks that are over have found."""
        for grammar, running in list(self._running.items()):
            future = running.future
            if not future.done():
                continue
            del self._running[grammar]
            error = None if future.cancelled() else future.exception()
            if isinstance(error, InvalidRequestError):
                self._remember(grammar, _Verdict(self._clock() + _REMEMBERS_FAILURES_S, error))
            elif error is None and not future.cancelled():
                self._remember(grammar, _Verdict())

    def _remember(self, grammar: Grammar, verdict: _Verdict) -> None:
        self._known[grammar] = verdict
        self._known.move_to_end(grammar)
        if len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)


@dataclasses.dataclass(slots=True)
class _Running:
    """A check under way, and how many requests wait for it."""

    future: Future[None]
    num_waiting: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class _Verdict:
    """What a check found.

    Attributes:
        until: in the clock's seconds.
    """

    until: float = math.inf
    error: InvalidRequestError | None = None

    def tell(self) -> None:
        """Raises the error, if there is one; each time another, since a traceback belongs to its request."""
        if self.error is not None:
            field = self.error.field
            raise InvalidRequestError(field, self.error.message.removeprefix(f"{field}: "))
