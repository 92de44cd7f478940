"""How long to wait before a stream is opened again."""

from __future__ import annotations

import asyncio

_FIRST_S = 0.05


class Backoff:
    """Doubles from 50 ms up to `max_s`; starts over when the stream has worked."""

    def __init__(self, max_s: float) -> None:
        self._max_s = max_s
        self._next_s = _FIRST_S

    def reset(self) -> None:
        self._next_s = _FIRST_S

    async def wait(self) -> None:
        delay_s = min(self._next_s, self._max_s)
        self._next_s = 2 * delay_s
        await asyncio.sleep(delay_s)
