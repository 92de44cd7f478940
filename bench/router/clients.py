"""Clients that count what arrives and read none of it, so that they take little from the machine that they share.

Each speaks one protocol and sends any number of requests at a time.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Protocol, cast

import grpc.aio

from baton.errors import InternalError
from baton.v1 import inference_pb2
from bench.router.bare_server import METHOD as BARE_METHOD

_GENERATE = "/baton.v1.Inference/Generate"
_END_OF_HEAD = b"\r\n\r\n"
_LAST_CHUNK = b"0\r\n\r\n"
_EVENT = b"data: {"

_Call = grpc.aio.UnaryStreamMultiCallable[bytes, bytes]
# Called for each message or event as it arrives.
OnMessage = Callable[[], None]


class StreamClient(Protocol):
    """One server, asked over one protocol."""

    async def stream(self, prompt: str, max_tokens: int, on_message: OnMessage) -> None:
        """One request to its end; greedy, and past the end of sequence.

        Raises:
            grpc.aio.AioRpcError, InternalError: it failed.
        """

    async def close(self) -> None:
        """Ends all connections."""


class GrpcClient:
    """Baton's gRPC API at "host:port"."""

    def __init__(self, target: str) -> None:
        self._channel = grpc.aio.insecure_channel(target)
        self._generate: _Call = self._channel.unary_stream(_GENERATE)

    async def stream(self, prompt: str, max_tokens: int, on_message: OnMessage) -> None:
        sampling = inference_pb2.SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        request = inference_pb2.GenerateRequest(text=prompt, sampling=sampling)
        async for _ in self._generate(request.SerializeToString()):
            on_message()

    async def close(self) -> None:
        await self._channel.close()


class BareClient:
    """The bare server at "host:port", read as `GrpcClient` reads the router."""

    def __init__(self, target: str) -> None:
        self._channel = grpc.aio.insecure_channel(target)
        self._stream: _Call = self._channel.unary_stream(BARE_METHOD)

    async def stream(self, prompt: str, max_tokens: int, on_message: OnMessage) -> None:
        async for _ in self._stream(b"%d" % max_tokens):
            on_message()

    async def close(self) -> None:
        await self._channel.close()


class SseClient:
    """OpenAI's completions at "http://host:port", over connections that are kept."""

    def __init__(self, url: str) -> None:
        self._host, _, port = url.removeprefix("http://").rpartition(":")
        self._port = int(port)
        self._idle: list[_Connection] = []

    async def stream(self, prompt: str, max_tokens: int, on_message: OnMessage) -> None:
        connection = self._idle.pop() if self._idle else await self._connect()
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        await connection.post("/v1/completions", json.dumps(body).encode(), on_message)
        self._idle.append(connection)

    async def close(self) -> None:
        for connection in self._idle:
            connection.close()

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: _Connection(self._host), self._host, self._port)
        return connection


class _Connection(asyncio.Protocol):
    """One HTTP connection; a request at a time, its answer chunked and each event in one chunk."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._transport: asyncio.Transport | None = None
        self._ended: asyncio.Future[None] | None = None
        self._on_message: OnMessage = _nothing
        self._unread = b""
        self._tail = b""
        self._in_head = True

    async def post(self, path: str, body: bytes, on_message: OnMessage) -> None:
        assert self._transport is not None
        self._ended = asyncio.get_running_loop().create_future()
        self._on_message, self._unread, self._tail, self._in_head = on_message, b"", b"", True
        head = f"POST {path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
        self._transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await self._ended

    def close(self) -> None:
        assert self._transport is not None
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, received: bytes) -> None:
        data = self._unread + received
        if self._in_head:
            head, end, data = data.partition(_END_OF_HEAD)
            if not end:
                self._unread = head
                return
            if not head.startswith(b"HTTP/1.1 200"):
                self._end(InternalError(f"the router answered {head[:64]!r}"))
                return
            self._in_head = False
        # An event and the end may be cut anywhere; an event begins a line.
        lines, _, self._unread = data.rpartition(b"\n")
        for _ in range(lines.count(_EVENT)):
            self._on_message()
        self._tail = (self._tail + received)[-len(_LAST_CHUNK) :]
        if self._tail == _LAST_CHUNK:
            self._end(None)

    def connection_lost(self, error: Exception | None) -> None:
        self._end(InternalError(f"the connection broke: {error}"))

    def _end(self, error: Exception | None) -> None:
        if self._ended is None or self._ended.done():
            return
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)


def _nothing() -> None:
    """Nobody waits for messages."""
