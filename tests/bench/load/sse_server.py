"""A tiny server with OpenAI's routes, whose answers a test writes."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

MODELS = {"object": "list", "data": [{"id": "tiny", "max_model_len": 128}]}


class SseServer:
    """Answers /v1/models, and anything else with the next of `answers`.

    An answer is a list of chunks, each sent by itself, or a status with an error's message. A list that does not end
    with b"" is cut off. When there are no answers left, nothing is answered.

    Attributes:
        requests: their paths, headers in lower case, and JSON.
        unanswered: set when a request waits in vain.
    """

    def __init__(self) -> None:
        self.url = ""
        self.models: Any = MODELS
        self.answers: list[Sequence[bytes] | tuple[int, str]] = []
        self.requests: list[tuple[str, str, Any]] = []
        self.unanswered = asyncio.Event()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                lengths = [line.partition(":")[2] for line in head.split("\r\n") if line.startswith("content-length:")]
                body = await reader.readexactly(int(lengths[0]) if lengths else 0)
                path = head.split(" ")[1]
                if path == "/v1/models":
                    self._write(writer, 200, json.dumps(self.models))
                    continue
                self.requests.append((path, head, json.loads(body)))
                if not self.answers:
                    self.unanswered.set()
                    await reader.read()
                    break
                answer = self.answers.pop(0)
                if isinstance(answer, tuple):
                    self._write(writer, answer[0], json.dumps({"error": {"message": answer[1]}}))
                    continue
                writer.write(
                    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
                )
                for chunk in answer:
                    writer.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
                    await writer.drain()
                if not answer or answer[-1] != b"":
                    break
        writer.close()

    def _write(self, writer: asyncio.StreamWriter, status: int, body: str) -> None:
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode())


@contextlib.asynccontextmanager
async def sse_server() -> AsyncIterator[SseServer]:
    """A server on a free port; all its connections end with it."""
    tiny = SseServer()
    server = await asyncio.start_server(tiny.handle, "127.0.0.1", 0)
    tiny.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield tiny
    finally:
        server.close()
        await server.wait_closed()
