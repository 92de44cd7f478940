"""`python -m router CONFIG.json`: runs a router until SIGTERM or SIGINT.

CONFIG.json holds a `baton.config.RouterProcessConfig`. Once both ports listen, one line of JSON on stdout says where:
{"grpc": "host:port", "http": "http://host:port", "pid": N}, with https where the ports have TLS. When the first request
can be served, a second one says {"ready": true}. Logs go to stderr. A signal drains and exits 0.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import pathlib
import signal
import sys

import pydantic
import uvloop

from baton import logs
from baton.config import RouterProcessConfig
from router.server import RouterServer

# Objects made and not yet freed before the garbage collector looks at them. Each token that is being written is about
# ten of them, so that with the default of 700 it would look at every step of 64 streams, and find nothing.
_GC_THRESHOLD = 5_000


async def serve(config: RouterProcessConfig) -> None:
    """Starts, waits for a signal, drains, stops."""
    terminated = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, terminated.set)
    server = RouterServer(config)
    try:
        await server.start()
        _spare_garbage_collector()
        print(json.dumps({"grpc": server.grpc_address, "http": server.url, "pid": os.getpid()}), flush=True)
        announcing = asyncio.create_task(_announce_ready(server))
        await terminated.wait()
        announcing.cancel()
        await server.drain(config.drain_s)
    finally:
        await server.stop()


def _spare_garbage_collector() -> None:
    """Has it pass over what was made so far, which lives as long as the process, and over what steps make and free."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD)


async def _announce_ready(server: RouterServer) -> None:
    """Told here rather than asked for on a port, which may want a certificate of whoever asks."""
    await server.wait_ready()
    print(json.dumps({"ready": True}), flush=True)


def main() -> int:
    """Exit status 0 after a signal, 2 where the configuration or the model cannot be used."""
    if len(sys.argv) != 2:
        print("usage: python -m router CONFIG.json", file=sys.stderr)
        return 2
    try:
        config = RouterProcessConfig.model_validate_json(pathlib.Path(sys.argv[1]).read_bytes())
    except (OSError, pydantic.ValidationError) as error:
        print(f"{sys.argv[1]}: {error}", file=sys.stderr)
        return 2
    logs.configure(config.log, role="router")
    try:
        uvloop.run(serve(config))
    except (ValueError, OSError) as error:
        print(f"router: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
