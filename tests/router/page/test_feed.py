from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from baton.errors import OverloadedError
from router.page.feed import Capture, Feed


class Source:
    """Something to see, which counts how often it was looked at."""

    def __init__(self) -> None:
        self.version = 0
        self.settled = True
        self.num_captures = 0

    def capture(self) -> Capture:
        self.num_captures += 1
        return Capture({"version": self.version}, self.settled)


@pytest.fixture
def source() -> Source:
    return Source()


def feed_of(source: Source, **options: Any) -> Feed:
    options = {"interval_s": 0.01, "heartbeat_s": 60.0, **options}
    return Feed(source.capture, lambda: source.version, time.monotonic, **options)


@contextlib.asynccontextmanager
async def watching(feed: Feed) -> AsyncGenerator[AsyncGenerator[bytes, None], None]:
    """A viewer that has had its first frame."""
    async with contextlib.aclosing(feed.watch()) as events:
        assert (await anext(events)).startswith(b"retry: ")
        assert (await anext(events)).startswith(b"event: frame")
        yield events


def content(event: bytes) -> dict[str, Any]:
    name, _, data = event.partition(b"\n")
    assert name == b"event: frame"
    loaded = json.loads(data.removeprefix(b"data: "))
    assert isinstance(loaded, dict)
    return loaded


async def test_nothing_is_computed_where_nobody_looks(source: Source) -> None:
    feed = feed_of(source)
    before = asyncio.all_tasks()
    async with watching(feed):
        assert feed.num_viewers == 1
        assert len(asyncio.all_tasks()) == len(before) + 1
    source.version += 1
    seen = source.num_captures
    for _ in range(3):
        await asyncio.sleep(0)
    assert asyncio.all_tasks() == before
    assert (feed.num_viewers, source.num_captures) == (0, seen)


async def test_a_change_is_one_frame_for_all(source: Source) -> None:
    feed = feed_of(source)
    async with contextlib.AsyncExitStack() as stack:
        viewers = [await stack.enter_async_context(watching(feed)) for _ in range(50)]
        assert source.num_captures <= 2
        seen = source.num_captures
        source.version = 7
        events = await asyncio.gather(*(anext(viewer) for viewer in viewers))
        assert source.num_captures == seen + 1
        assert len({id(event) for event in events}) == 1
        assert [content(event) for event in events] == [{"version": 7}] * 50


async def test_a_slow_viewer_skips_frames(source: Source) -> None:
    feed = feed_of(source)
    async with watching(feed) as fast, watching(feed) as slow:
        for version in (1, 2, 3):
            source.version = version
            assert content(await anext(fast)) == {"version": version}
        assert content(await anext(slow)) == {"version": 3}


async def test_frames_go_on_while_anything_fades(source: Source) -> None:
    feed = feed_of(source)
    source.settled = False
    async with watching(feed) as events:
        for _ in range(3):
            assert content(await anext(events)) == {"version": 0}
        source.settled = True
        await anext(events)
        seen = source.num_captures
    assert source.num_captures == seen


async def test_a_heartbeat_says_that_nothing_changed(source: Source) -> None:
    feed = feed_of(source, heartbeat_s=0.02)
    async with watching(feed) as events:
        for _ in range(2):
            assert await anext(events) == b"event: heartbeat\ndata:\n\n"
    assert source.num_captures == 1


async def test_whoever_asks_frames_are_no_more_frequent_than_the_interval(source: Source) -> None:
    feed = feed_of(source, interval_s=60.0)
    assert json.loads(feed.frame()) == {"version": 0}
    source.version = 1
    assert json.loads(feed.frame()) == {"version": 0}
    assert source.num_captures == 1


async def test_too_many_viewers_are_refused(source: Source) -> None:
    feed = feed_of(source, max_viewers=1)
    async with watching(feed):
        with pytest.raises(OverloadedError, match="1 pages are open"):
            feed.watch()
    async with watching(feed):
        pass


async def test_closing_ends_every_stream(source: Source) -> None:
    feed = feed_of(source)
    async with watching(feed) as first, watching(feed) as second:
        feed.close()
        for events in (first, second):
            with pytest.raises(StopAsyncIteration):
                await anext(events)
    with pytest.raises(OverloadedError):
        feed.watch()
