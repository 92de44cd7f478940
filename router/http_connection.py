"""HTTP connections of the router: uvicorn's, with writes that leave together and chunks that need no coroutine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from starlette.types import Scope
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from router.batch import WriteBatch

# Takes a chunk of a body, unless it would have to wait; whether it has taken it.
WriteChunk = Callable[[bytes], bool]

_EXTENSION = "baton.write_chunk"


class HttpConnection(H11Protocol):
    """One connection.

    Args:
        batch: of all connections.
    """

    def __init__(self, batch: WriteBatch, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._batch = batch

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast("asyncio.Transport", _BatchedTransport(transport, self._batch)))

    def handle_events(self) -> None:
        super().handle_events()
        # The task of a request that began here has not run yet. HTTP/1.0 has no chunks.
        if self.cycle is not None and self.conn.their_http_version == b"1.1":
            extensions = cast("dict[str, Any]", self.scope.setdefault("extensions", {}))
            extensions.setdefault(_EXTENSION, _Chunks(self.flow, self.transport).write)


def chunk_writer(scope: Scope) -> WriteChunk | None:
    """Writes chunks of a body without Content-Length past ASGI, once its first part was sent; None where none can."""
    return cast("WriteChunk | None", scope.get("extensions", {}).get(_EXTENSION))


class _Chunks:
    """The body of one response, as h11 would write it: what it checks of each chunk costs more than the chunk."""

    __slots__ = ("_flow", "_transport")

    def __init__(self, flow: FlowControl, transport: asyncio.Transport) -> None:
        self._flow = flow
        self._transport = transport

    def write(self, chunk: bytes) -> bool:
        if self._flow.write_paused or self._transport.is_closing():
            return False
        self._transport.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        return True


class _BatchedTransport:
    """A transport whose writes leave with the batch, all of one turn as one."""

    def __init__(self, transport: asyncio.Transport, batch: WriteBatch) -> None:
        self._transport = transport
        self._batch = batch
        self._parts: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._batch.add(self._flush)
        self._parts.append(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        parts, self._parts = self._parts, []
        if parts and not self._transport.is_closing():
            self._transport.write(b"".join(parts))
