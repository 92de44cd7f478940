"""What leaves by the short way is what uvicorn would have sent."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from router.http import HttpServer
from router.http_connection import chunk_writer

PARTS = [b"data: 1\n\n", b"data: two\n\n", b"x" * 5000]


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Sends the first part as ASGI has it, and the others by the short way where there is one."""
    write_chunk = chunk_writer(scope)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": PARTS[0], "more_body": True})
    for part in PARTS[1:]:
        if write_chunk is None or not write_chunk(part):
            await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[int]:
    server = HttpServer(app)
    config = server.config
    config.load()
    server.lifespan = config.lifespan_class(config)
    make: Any = config.http_protocol_class
    listener = await asyncio.get_running_loop().create_server(
        lambda: make(config=config, server_state=server.server_state, app_state={}),
        "127.0.0.1",
        0,
    )
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        listener.close()
        await listener.wait_closed()


async def answer_to(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    answer = await reader.read()
    writer.close()
    return answer


async def test_each_part_is_a_chunk() -> None:
    async with serving() as port:
        answer = await answer_to(port, b"POST / HTTP/1.1\r\nhost: me\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head.lower()
    assert body == b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in PARTS) + b"0\r\n\r\n"


async def test_http_1_0_has_no_chunks() -> None:
    async with serving() as port:
        answer = await answer_to(port, b"POST / HTTP/1.0\r\ncontent-length: 0\r\n\r\n")
    assert answer.partition(b"\r\n\r\n")[2] == b"".join(PARTS)


@pytest.mark.parametrize("scope", [{}, {"extensions": {}}])
def test_elsewhere_there_is_no_short_way(scope: Scope) -> None:
    assert chunk_writer(scope) is None
