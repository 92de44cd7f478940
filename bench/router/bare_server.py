"""`python -m bench.router.bare_server MESSAGE_BYTES STEP_S`: what streaming over grpc.aio costs by itself.

A server whose one method, `METHOD`, writes the same prebuilt message once a step; the request is the number of
messages, as decimal digits. All streams step together, as those of a decode worker do. One line on stdout, "host:port",
says where it listens; ends with stdin.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import uvloop

METHOD = "/bench.Bare/Stream"


class Ticker:
    """Wakes all who wait, once every `step_s`."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._tick: asyncio.Event | None = None

    async def wait(self) -> None:
        """Returns at the next tick."""
        if self._tick is None:
            self._tick = asyncio.Event()
            asyncio.get_running_loop().call_later(self._step_s, self._wake)
        await self._tick.wait()

    def _wake(self) -> None:
        assert self._tick is not None
        now, self._tick = self._tick, None
        now.set()


async def serve(message: bytes, step_s: float) -> None:
    ticker = Ticker(step_s)

    async def stream(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[bytes]:
        for _ in range(int(request)):
            await ticker.wait()
            yield message

    service, _, name = METHOD[1:].partition("/")
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_stream_rpc_method_handler(stream)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {name: handler})])
    print(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", flush=True)
    await server.start()
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)


if __name__ == "__main__":
    uvloop.run(serve(bytes(int(sys.argv[1])), float(sys.argv[2])))
