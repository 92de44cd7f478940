"""The watch stream: a snapshot first, then merged deltas in sequence."""

from __future__ import annotations

from worker.watch import Load, WatchPublisher


async def test_a_new_watcher_gets_a_snapshot_and_then_deltas_in_sequence() -> None:
    publisher = WatchPublisher()
    publisher.update(Load(free_blocks=7), stored=[b"a", b"b"])
    stream = publisher.watch()
    first = await anext(stream)
    assert (first.sequence, first.snapshot, set(first.stored), first.free_blocks) == (0, True, {b"a", b"b"}, 7)
    publisher.update(Load(free_blocks=6), stored=[b"c"], removed=[b"a"])
    second = await anext(stream)
    assert (second.sequence, second.snapshot) == (1, False)
    assert (list(second.stored), list(second.removed), second.free_blocks) == ([b"c"], [b"a"], 6)
    await stream.aclose()


async def test_deltas_that_a_watcher_has_not_read_merge() -> None:
    publisher = WatchPublisher()
    stream = publisher.watch()
    await anext(stream)
    publisher.update(Load(free_blocks=1), stored=[b"a", b"b"])
    publisher.update(Load(free_blocks=2), removed=[b"a"])
    publisher.update(Load(free_blocks=3), stored=[b"a"], removed=[b"b"])
    message = await anext(stream)
    assert set(message.stored) == {b"a"}
    assert b"b" in set(message.removed)
    assert b"a" not in set(message.removed)
    assert message.free_blocks == 3
    await stream.aclose()


async def test_what_went_and_came_back_is_in_the_snapshot_of_a_later_watcher() -> None:
    publisher = WatchPublisher()
    publisher.update(Load(), stored=[b"a"])
    publisher.update(Load(), removed=[b"a"])
    publisher.update(Load(), stored=[b"a"])
    stream = publisher.watch()
    assert list((await anext(stream)).stored) == [b"a"]
    await stream.aclose()
