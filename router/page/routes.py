"""The page's routes.

/               the page; /page/NAME are its scripts, style and icon
/live           server-sent events: `frame` with a JSON object, at most two a second, and `heartbeat`
/live/snapshot  the newest frame, for scripts
"""

from __future__ import annotations

import contextlib
import hashlib
import pathlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from baton.errors import OverloadedError
from router.page.feed import Feed

_FOLDER = pathlib.Path(__file__).parent / "static"
_MEDIA_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
# Kept by the browser and asked for by ETag each time, so that an upgrade shows at once.
_CACHED = {"Cache-Control": "no-cache"}
_UNCACHED = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}

_Endpoint = Callable[[Request], Coroutine[Any, Any, Response]]


def page_routes(feed: Feed) -> Sequence[BaseRoute]:
    """All routes of the page; its files are read here, once."""

    async def live(request: Request) -> Response:
        if request.method == "HEAD":
            return Response(headers=_UNCACHED, media_type="text/event-stream")
        try:
            return _LiveResponse(feed.watch())
        except OverloadedError as error:
            return Response(f"{error.message}\n", error.http_status, {**_UNCACHED, "Retry-After": "10"})

    async def snapshot(request: Request) -> Response:
        return Response(feed.frame(), headers=_UNCACHED, media_type="application/json")

    files = sorted(path for path in _FOLDER.iterdir() if path.suffix in _MEDIA_TYPES and path.name != "index.html")
    return [
        Route("/", _file(_FOLDER / "index.html")),
        *(Route(f"/page/{path.name}", _file(path)) for path in files),
        Route("/live", live, methods=["GET"]),
        Route("/live/snapshot", snapshot, methods=["GET"]),
    ]


def _file(path: pathlib.Path) -> _Endpoint:
    content = path.read_bytes()
    etag = f'"{hashlib.sha256(content).hexdigest()[:24]}"'
    headers = {**_HEADERS, **_CACHED, "ETag": etag}

    async def answer(request: Request) -> Response:
        if etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=_MEDIA_TYPES[path.suffix])

    return answer


class _LiveResponse(StreamingResponse):
    """A viewer's stream; its events are closed with the connection, so that the viewer counts no longer."""

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        headers = {**_UNCACHED, "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._events):
            await super().__call__(scope, receive, send)
