"""Answers that end when their client hangs up: whole ones, and streams of server-sent events.

One task does the work and another watches the connection, so whatever the work holds is released at once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from router.http_connection import WriteChunk, chunk_writer
from router.openai.errors import ApiError
from router.sink import Writer

_T = TypeVar("_T")

_DONE = b"data: [DONE]\n\n"
_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    # Proxies must not collect events.
    "x-accel-buffering": "no",
}


async def unless_hung_up(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of the work, which is cancelled when the client goes.

    Args:
        receive: of a request whose body was read.

    Raises:
        ClientDisconnect: the client went first.
    """
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_hang_up(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


class NoAnswer(Response):
    """For a client that is gone."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends nothing."""


class EventStream(Response):
    """Events as they come, with `[DONE]` after the last.

    The status is sent with the first event, so that what fails before it is an ordinary error. What fails later is told
    in an event of its own, which then is the last.

    Args:
        generate: sends the events, each one or more whole ones, and returns after the last; cancelled where the client
            goes.
        on_error: what the client is told of an exception.
    """

    def __init__(
        self, generate: Callable[[Writer[bytes]], Awaitable[None]], *, on_error: Callable[[Exception], ApiError]
    ) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._generate = generate
        self._on_error = on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the stream."""
        with contextlib.suppress(ClientDisconnect):
            refusal = await unless_hung_up(receive, self._send_events(send, chunk_writer(scope)))
            if refusal is not None:
                response = refusal.response()
                response.headers["x-request-id"] = self.headers["x-request-id"]
                await response(scope, receive, send)

    async def _send_events(self, send: Send, write_chunk: WriteChunk | None) -> ApiError | None:
        """The error of a stream that did not begin."""
        began = False

        async def write(event: bytes) -> None:
            nonlocal began
            if not began:
                began = True
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": event, "more_body": True})

        def write_now(event: bytes) -> bool:
            return began and write_chunk is not None and write_chunk(event)

        writer = Writer(write, write_now=write_now)
        last = _DONE
        try:
            await self._generate(writer)
        except Exception as error:
            refusal = self._on_error(error)
            if not began:
                return refusal
            last = b"data: " + refusal.body() + b"\n\n"
        await writer.drain()
        await send({"type": "http.response.body", "body": last, "more_body": False})
        return None


async def _hang_up(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
