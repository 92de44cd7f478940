"""Baton as an application of Ray Serve, which is what a RayService of KubeRay runs.

Serve keeps one replica. It runs `baton serve` as a child, tells Serve whether that lives, and passes HTTP requests on
to Baton's router, which is on the same node. gRPC does not go through Serve: the router listens on a port of its own.
Needs `ray[serve]`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import AsyncIterator, Mapping

import aiohttp
from ray import serve
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from deploy import child
from deploy.errors import StartError
from deploy.kuberay.arguments import Arguments

# Of Ray's worker processes, in which replicas run; `baton serve` joins the cluster as a driver.
_OF_RAY_WORKERS = ("RAY_JOB_ID", "RAY_RAYLET_PID", "RAY_CLIENT_MODE", "RAY_RUNTIME_ENV", "CUDA_VISIBLE_DEVICES")
# Of one connection (RFC 9110, section 7.6.1), or made anew.
_HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "content-length"}
)
_CONNECT_TIMEOUT_S = 5.0


class Baton:
    """The replica. Serve calls all methods on one event loop."""

    async def __init__(self, arguments: Arguments) -> None:  # type: ignore[misc]  # Serve awaits it
        self._drain_s = arguments.drain_s
        self._folder = tempfile.TemporaryDirectory(prefix="baton-", ignore_cleanup_errors=True)
        ready_file = pathlib.Path(self._folder.name, "ready.json")
        self._process = await child.spawn_module(
            "deploy.cli",
            *("serve", *arguments.arguments, "--ready-file", str(ready_file)),
            environment=_environment(os.environ),
            stdout=asyncio.subprocess.PIPE,
        )
        await self._wait_ready()
        # The line that says that all workers are up is not waited for, but must find a reader.
        self._reading = asyncio.create_task(self._read_line())
        description = await asyncio.to_thread(ready_file.read_text)
        self._url = str(json.loads(description)["http"])
        self._session = aiohttp.ClientSession(
            auto_decompress=False,
            # An answer may take as long as it likes.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S),
            connector=aiohttp.TCPConnector(limit=0),
        )

    async def __call__(self, request: Request) -> Response:
        """Passes a request on, and its answer back as it comes; a client that hangs up ends the request."""
        answer = await self._session.request(
            request.method,
            f"{self._url}{request.url.path}",
            params=request.url.query,
            headers=_end_to_end(request.headers),
            data=await request.body(),
            allow_redirects=False,
        )
        headers = _end_to_end(answer.headers)
        return StreamingResponse(_chunks(answer), status_code=answer.status, headers=headers)

    def check_health(self) -> None:
        """Raises where `baton serve` has ended, which Serve answers with another replica."""
        if self._process.returncode is not None:
            raise RuntimeError(f"baton serve ended ({child.describe_exit(self._process.returncode)})")

    async def __del__(self) -> None:
        """Lets `baton serve` drain. Called by Serve when the requests that it knows of have ended."""
        if self._process.returncode is None:
            self._process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), self._drain_s)
        await child.kill(self._process)
        await self._session.close()
        self._folder.cleanup()

    async def _wait_ready(self) -> None:
        while line := await self._read_line():
            if line.startswith(b"ready in "):
                return
        raise StartError(f"baton serve ended ({child.describe_exit(await self._process.wait())})")

    async def _read_line(self) -> bytes:
        assert self._process.stdout is not None
        return await self._process.stdout.readline()


def app(arguments: Arguments) -> serve.Application:
    """The application for `serveConfigV2`; its `args` are the fields of `Arguments`."""
    deployment = serve.deployment(
        Baton,
        name="Baton",
        num_replicas=1,
        # Baton's router queues and refuses; Serve only passes on.
        max_ongoing_requests=100_000,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=arguments.drain_s,
    )
    return deployment.bind(arguments)


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in _OF_RAY_WORKERS}


def _end_to_end(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in _HOP_BY_HOP}


async def _chunks(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    async with answer:
        async for chunk in answer.content.iter_any():
            yield chunk
