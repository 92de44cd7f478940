"""A real router in front of mock workers on a thread of its own, for tests of what blocks: commands, pages."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator

from baton.config import DecodeConfig, RouterProcessConfig, ServeConfig, TransferConfig
from bench.mock_workers.cluster import MockCluster
from router.server import RouterServer


@contextlib.contextmanager
def running_router(config: ServeConfig) -> Iterator[RouterServer]:
    """The router of a configuration, ready, on free ports; on a loop of its own."""
    loop = asyncio.new_event_loop()
    started = threading.Event()
    stop = asyncio.Event()
    servers: list[RouterServer] = []
    errors: list[BaseException] = []

    async def run() -> None:
        async with MockCluster() as cluster:
            server = RouterServer(
                RouterProcessConfig(
                    model=config.model,
                    router=config.router.model_copy(update={"grpc_port": 0, "http_port": 0}),
                    decode=DecodeConfig(),
                    transfer=TransferConfig(),
                    membership_address=cluster.membership.address,
                )
            )
            try:
                await server.start()
                await server.wait_ready()
                servers.append(server)
                started.set()
                await stop.wait()
            finally:
                await server.stop()

    def work() -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: loop) as runner:
                runner.run(run())
        except BaseException as error:
            errors.append(error)
        finally:
            started.set()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        started.wait()
        if errors:
            raise errors[0]
        yield servers[0]
    finally:
        if servers:
            loop.call_soon_threadsafe(stop.set)
        thread.join()
