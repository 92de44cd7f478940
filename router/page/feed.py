"""One frame a tick for all who look at the page; where nobody looks nothing is computed and no task runs.

A frame is captured and serialised once, and every viewer is sent the same bytes. A slow viewer skips frames: nothing is
queued for it. On the router's event loop.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any, NamedTuple

from baton.errors import OverloadedError

# How soon a browser comes back after the stream broke.
_RETRY = b"retry: 1000\n\n"


class Capture(NamedTuple):
    """What there is to see.

    Attributes:
        settled: it will not change by time alone.
    """

    content: dict[str, Any]
    settled: bool


class Feed:
    """The stream of frames, as server-sent events.

    Args:
        capture: what there is to see now.
        version: a number that is another one whenever there is something new to see; asked once a tick.
        clock: monotonic seconds.
        interval_s: shortest time between two frames.
        heartbeat_s: longest time without a sign of life.
    """

    def __init__(
        self,
        capture: Callable[[], Capture],
        version: Callable[[], object],
        clock: Callable[[], float],
        *,
        interval_s: float = 0.5,
        heartbeat_s: float = 10.0,
        max_viewers: int = 256,
    ) -> None:
        self._capture = capture
        self._version = version
        self._clock = clock
        self._interval_s = interval_s
        self._heartbeat_s = heartbeat_s
        self._max_viewers = max_viewers
        self._frame = b""
        self._event = b""
        self._frame_number = 0
        self._captured_at = float("-inf")
        self._captured_version: object = None
        self._settled = False
        self._published = asyncio.Event()
        self._ticker: asyncio.Task[None] | None = None
        self._closed = False
        self.num_viewers = 0

    def frame(self) -> bytes:
        """The newest frame, as JSON; never two captures within `interval_s`, whoever asks."""
        if self._clock() - self._captured_at >= self._interval_s:
            self._capture_frame()
        return self._frame

    def watch(self) -> AsyncGenerator[bytes, None]:
        """Events for one viewer until it goes or the feed closes; the iterator must be closed.

        Raises:
            OverloadedError: too many look already.
        """
        if self.num_viewers >= self._max_viewers or self._closed:
            raise OverloadedError(f"{self.num_viewers} pages are open, the most that may be; try again later")
        return self._events()

    def close(self) -> None:
        """Ends every viewer's stream."""
        self._closed = True
        self._wake()

    async def _events(self) -> AsyncGenerator[bytes, None]:
        self.num_viewers += 1
        self._ticker = self._ticker or asyncio.create_task(self._tick())
        try:
            yield _RETRY
            self.frame()
            seen = 0
            while not self._closed:
                published = self._published
                if self._frame_number != seen:
                    seen = self._frame_number
                    yield self._event
                elif not await _is_set_within(published, self._heartbeat_s):
                    yield b"event: heartbeat\ndata:\n\n"
        finally:
            self.num_viewers -= 1
            if not self.num_viewers and self._ticker is not None:
                self._ticker.cancel()
                self._ticker = None

    async def _tick(self) -> None:
        """Looks for something new for as long as anybody watches."""
        while True:
            too_early_s = self._captured_at + self._interval_s - self._clock()
            if too_early_s > 0:
                await asyncio.sleep(too_early_s)
            elif self._settled and self._version() == self._captured_version:
                await asyncio.sleep(self._interval_s)
            else:
                self._capture_frame()

    def _capture_frame(self) -> None:
        self._captured_at = self._clock()
        self._captured_version = self._version()
        content, self._settled = self._capture()
        self._frame = json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
        self._event = b"event: frame\ndata: " + self._frame + b"\n\n"
        self._frame_number += 1
        self._wake()

    def _wake(self) -> None:
        published, self._published = self._published, asyncio.Event()
        published.set()


async def _is_set_within(event: asyncio.Event, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            return await event.wait()
    except TimeoutError:
        return False
