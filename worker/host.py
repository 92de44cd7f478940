"""Hosts a worker's gRPC services: an event loop in a thread of its own, the server, and the metrics endpoint.

Ray actors and plain processes drive workers from a thread that blocks, so the loop cannot be theirs.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry, start_http_server

from baton.errors import BatonError
from baton.tracing import Metadata

T = TypeVar("T")

# Frames do not pass here, but a request of the longest prompt with its hashes does.
_OPTIONS_COMMON = (("grpc.so_reuseport", 0), ("grpc.keepalive_permit_without_calls", 1))


class WorkerHost:
    """One control-plane server. `start` and `stop` are called by the thread that owns the worker."""

    def __init__(self, host: str, *, max_message_bytes: int, registry: CollectorRegistry) -> None:
        self._host = host
        self._max_message_bytes = max_message_bytes
        self._registry = registry
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="control-plane", daemon=True)
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()
        self._metrics: tuple[Any, threading.Thread] | None = None
        self.address = ""
        self.metrics_address = ""

    def start(self, register: Callable[[grpc.aio.Server], None]) -> None:
        """Listen on free ports; `register` adds the worker's services to the server."""
        self._thread.start()
        self.run(self._start(register))
        server, thread = start_http_server(0, addr=self._host, registry=self._registry)
        self._metrics = (server, thread)
        self.metrics_address = f"{self._host}:{server.server_port}"

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for it; not from the loop's own thread."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def stop(self, grace_s: float = 0.0) -> None:
        """Close all ports and streams, and end the threads. Idempotent."""
        if self.loop.is_closed():
            return
        if self._server is not None:
            self.run(self._server.stop(grace_s))
        if self._metrics is not None:
            server, thread = self._metrics
            server.shutdown()
            server.server_close()
            thread.join()
        if self._thread.is_alive():
            self.run(self._cancel_tasks())
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
        self.loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    async def _start(self, register: Callable[[grpc.aio.Server], None]) -> None:
        self._server = grpc.aio.server(
            options=[
                *_OPTIONS_COMMON,
                ("grpc.max_receive_message_length", self._max_message_bytes),
                ("grpc.max_send_message_length", self._max_message_bytes),
            ]
        )
        register(self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        port = self._server.add_insecure_port(f"{self._host}:0")
        self.address = f"{self._host}:{port}"
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        await self._server.start()

    async def _cancel_tasks(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def metadata(context: grpc.aio.ServicerContext[Any, Any]) -> Metadata:
    """What a call carries beside its message, as text."""
    return [(key, value) for key, value in context.invocation_metadata() or () if isinstance(value, str)]


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: BatonError) -> None:
    """End a call with an error's status: the seam between Baton's errors and a worker's wire."""
    await context.abort(grpc.StatusCode[error.status], error.message)
