"""A router without models: `python -m tests.deploy.fake_router CONFIG`. SERVING while it knows workers of both roles.

`served_name` says how it behaves: "router refuses" ends before it listens.
"""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
import signal
import sys

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from baton.config import RouterProcessConfig
from deploy.membership import follow_membership

SERVICE = "baton.v1.Inference"


async def main(config: RouterProcessConfig) -> None:
    if config.model.served_name == "router refuses":
        sys.exit(4)
    server, servicer = grpc.aio.server(), health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    await servicer.set(SERVICE, health_pb2.HealthCheckResponse.NOT_SERVING)
    port = server.add_insecure_port(f"{config.router.host}:{config.router.grpc_port}")
    await server.start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    http = f"http://{config.router.host}:{config.router.http_port or 1}"
    print(json.dumps({"grpc": f"{config.router.host}:{port}", "http": http, "pid": os.getpid()}), flush=True)
    following = asyncio.create_task(follow(config.membership_address, servicer))
    await stop.wait()
    following.cancel()
    await server.stop(None)


async def follow(membership: str, servicer: health.aio.HealthServicer) -> None:
    async for view in follow_membership(membership):
        complete = {worker.role for worker in view.workers} == {"prefill", "decode"}
        state = health_pb2.HealthCheckResponse.SERVING if complete else health_pb2.HealthCheckResponse.NOT_SERVING
        await servicer.set(SERVICE, state)
        if complete:
            print(json.dumps({"ready": True}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(RouterProcessConfig.model_validate_json(pathlib.Path(sys.argv[1]).read_text())))
