"""The thread that owns an engine: commands between steps, idle waiting, failures."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from worker.engine_thread import EngineThread


class CountingLoop:
    """Does as many steps as it was told to, then idles."""

    def __init__(self) -> None:
        self.todo = 0
        self.done = 0
        self.errors: list[Exception] = []
        self.raises: Exception | None = None
        self.progress = threading.Event()

    def step(self) -> bool:
        if self.raises is not None:
            error, self.raises = self.raises, None
            raise error
        if not self.todo:
            return False
        self.todo -= 1
        self.done += 1
        return True

    def next_wakeup_s(self) -> float | None:
        return None

    @property
    def is_idle(self) -> bool:
        return self.todo == 0

    def fail(self, error: Exception) -> None:
        self.errors.append(error)
        self.progress.set()

    def add(self, steps: int) -> None:
        self.todo += steps


@pytest.fixture
def loop() -> CountingLoop:
    return CountingLoop()


@pytest.fixture
def thread(loop: CountingLoop) -> Iterator[EngineThread]:
    thread = EngineThread("test")
    thread.start(loop)
    yield thread
    thread.stop()


def test_calls_run_on_the_engine_thread_and_return_their_result(thread: EngineThread) -> None:
    name = thread.call(lambda: threading.current_thread().name).result(10)
    assert name == "test"


def test_a_call_that_raises_hands_its_exception_over_and_the_thread_goes_on(thread: EngineThread) -> None:
    def fails() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        thread.call(fails).result(10)
    assert thread.call(lambda: 1).result(10) == 1


def test_a_posted_command_that_raises_takes_nothing_else_with_it(
    thread: EngineThread, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> None:
        raise KeyError("x")

    thread.post(fails)
    assert thread.call(lambda: 1).result(10) == 1
    assert "a command of test failed" in caplog.text


def test_a_posted_command_wakes_an_idle_loop(thread: EngineThread, loop: CountingLoop) -> None:
    thread.post(lambda: loop.add(5))
    thread.when_idle().result(10)
    assert loop.done == 5


def test_a_step_that_raises_is_reported_to_the_loop(thread: EngineThread, loop: CountingLoop) -> None:
    error = ValueError("boom")

    def break_next() -> None:
        loop.raises = error

    thread.post(break_next)
    assert loop.progress.wait(10)
    assert loop.errors == [error]
    assert thread.call(lambda: 2).result(10) == 2


def test_stopping_is_idempotent(loop: CountingLoop) -> None:
    thread = EngineThread("test")
    thread.start(loop)
    thread.stop()
    thread.stop()
