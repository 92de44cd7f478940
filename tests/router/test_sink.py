"""Writing without a task, as far as a connection takes it."""

from __future__ import annotations

import asyncio

import pytest

from router.batch import WriteBatch
from router.sink import Writer


class Connection:
    """Takes words while it is open, and waits while it is not."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.taken: list[str] = []
        self.error: Exception | None = None

    async def write(self, word: str) -> None:
        await self.open.wait()
        if self.error is not None:
            raise self.error
        self.taken.append(word)


async def test_what_need_not_wait_is_written_at_once() -> None:
    connection = Connection()
    writer = Writer(connection.write)
    for word in ("one", "two"):
        writer.send(word)
        assert writer.ready
    assert connection.taken == ["one", "two"]


async def test_what_waits_is_written_when_it_can_be() -> None:
    connection = Connection()
    writer = Writer(connection.write)
    connection.open.clear()
    writer.send("late")
    assert not writer.ready
    drained = [asyncio.create_task(writer.drain()) for _ in range(2)]
    await asyncio.sleep(0)
    connection.open.set()
    await asyncio.gather(*drained)
    assert writer.ready
    assert connection.taken == ["late"]


async def test_a_broken_connection_is_told_with_the_next_item() -> None:
    connection = Connection()
    writer = Writer(connection.write)
    connection.error = BrokenPipeError()
    writer.send("lost")
    await writer.drain()
    with pytest.raises(BrokenPipeError):
        writer.send("more")


async def test_the_short_way_is_taken_where_it_is_open() -> None:
    connection = Connection()
    short: list[str] = []

    def write_now(word: str) -> bool:
        if word.isupper():
            return False
        short.append(word)
        return True

    writer = Writer(connection.write, write_now=write_now)
    for word in ("a", "B", "c"):
        writer.send(word)
    assert (short, connection.taken) == (["a", "c"], ["B"])


async def test_writes_of_a_batch_begin_together() -> None:
    batch, connection = WriteBatch(), Connection()
    writers = [Writer(connection.write, batch=batch) for _ in range(3)]
    for index, writer in enumerate(writers):
        writer.send(str(index))
    assert not connection.taken
    await asyncio.gather(*(writer.drain() for writer in writers))
    assert connection.taken == ["0", "1", "2"]


def fail() -> None:
    raise OSError("broken")


async def test_a_call_of_a_batch_that_fails_keeps_no_other_from_being_made() -> None:
    batch, made = WriteBatch(), asyncio.Event()
    batch.add(fail)
    batch.add(made.set)
    await made.wait()
