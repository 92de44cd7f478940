"""The one thread that owns a worker's model, KV pool and scheduler.

Everybody else reaches them through `call` and `post`, which run between two steps. So the engine's state needs no
locks, and a test drives the same loop by calling `run_pending` and `step` itself.
"""

from __future__ import annotations

import collections
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol, TypeVar

logger = logging.getLogger(__name__)
T = TypeVar("T")


class SteppedLoop(Protocol):
    """A worker's engine loop, as its thread drives it."""

    def step(self) -> bool:
        """Do one step; False when there is nothing to do until a command or `next_wakeup_s`."""
        ...

    def next_wakeup_s(self) -> float | None:
        """Seconds until `step` should run although nothing was posted; None for never."""
        ...

    @property
    def is_idle(self) -> bool:
        """Whether no request holds anything."""
        ...

    def fail(self, error: Exception) -> None:
        """`step` raised: end the requests that it was about, so that the loop can go on."""
        ...


class EngineThread:
    """Runs a loop's steps and, between them, what other threads ask for."""

    def __init__(self, name: str, *, rest: Callable[[], None] = lambda: None) -> None:
        """`rest` is called before the thread waits because there is nothing to compute."""
        self._commands: collections.deque[Callable[[], None]] = collections.deque()
        self._wake = threading.Condition()
        self._waiting = False
        self._stopping = False
        self._name = name
        self._rest = rest
        self._thread: threading.Thread | None = None
        self._idle_waiters: list[Future[None]] = []

    def start(self, loop: SteppedLoop) -> None:
        self._thread = threading.Thread(target=self._run, args=(loop,), name=self._name, daemon=True)
        self._thread.start()

    def post(self, command: Callable[[], None]) -> None:
        """Run `command` on the engine thread before its next step. Any thread may call."""
        # The thread says that it waits before it looks for commands a last time, so one of the two sees the other.
        # While it computes, posting is an append and wakes nobody.
        self._commands.append(command)
        if self._waiting:
            with self._wake:
                self._wake.notify()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Like `post`, with a future for the result or the exception."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self.post(run)
        return future

    def when_idle(self) -> Future[None]:
        """Done once the loop holds no request, seen between two steps."""
        waiter: Future[None] = Future()
        self.post(lambda: self._idle_waiters.append(waiter))
        return waiter

    def run_pending(self) -> None:
        """Run what was posted. Only the engine thread, or a test that stands in for it."""
        while self._commands:
            command = self._commands.popleft()
            try:
                command()
            except Exception:
                # One command's bug must not take every other request with it.
                logger.exception("a command of %s failed", self._name)

    def wait(self, timeout_s: float | None) -> bool:
        """Block until something is posted or `stop` is called; False if the time was over before."""
        with self._wake:
            self._waiting = True
            woken = self._wake.wait_for(lambda: self._stopping or bool(self._commands), timeout_s)
            self._waiting = False
            return woken

    def stop(self) -> None:
        """End the thread after its current step; what is posted and not yet run is dropped."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self, loop: SteppedLoop) -> None:
        busy = True
        while not self._stopping:
            if not busy:
                self._rest()
                self.wait(loop.next_wakeup_s())
            self.run_pending()
            try:
                busy = loop.step()
            except Exception as error:
                logger.exception("a step of %s failed", self._name)
                loop.fail(error)
                busy = True
            while self._idle_waiters and loop.is_idle:
                self._idle_waiters.pop().set_result(None)
