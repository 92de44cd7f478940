"""The router's process, as `baton serve` keeps it: restarted on the same ports when it dies, drained at the end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any

from baton.config import RouterProcessConfig
from deploy import child
from deploy.backoff import Backoff, BackoffPolicy
from deploy.errors import StartError
from deploy.runtimes.base import STOP_GRACE_S


@dataclasses.dataclass(frozen=True, slots=True)
class RouterAddresses:
    """Where the router listens: "host:port" and "http://host:port"."""

    grpc: str
    http: str


class RouterProcess:
    """`python -m router`, with its config through a pipe: nothing to clean up."""

    def __init__(
        self,
        config: RouterProcessConfig,
        on_restart: Callable[[str], None],
        *,
        module: str = "router",
        backoff: BackoffPolicy | None = None,
    ) -> None:
        self._config = config
        self._on_restart = on_restart
        self._module = module
        self._backoff = Backoff(backoff or BackoffPolicy())
        self._process: asyncio.subprocess.Process | None = None
        self._addresses: asyncio.Future[RouterAddresses] = asyncio.get_running_loop().create_future()
        self._was_ready = asyncio.Event()

    async def run(self) -> None:
        """Keeps the router alive until cancelled, which leaves it running.

        Raises:
            StartError: it died before it first listened.
        """
        loop = asyncio.get_running_loop()
        while True:
            started = loop.time()
            self._process = await self._spawn()
            assert self._process.stdout is not None
            while line := await self._process.stdout.readline():
                self._told(json.loads(line))
            how = child.describe_exit(await self._process.wait())
            if not self._addresses.done():
                raise StartError(f"the router died while starting ({how})")
            self._on_restart(how)
            await asyncio.sleep(self._backoff.delay_s(loop.time() - started))

    async def wait_serving(self) -> RouterAddresses:
        """Returns when the first request can be served, as the router says."""
        await self._was_ready.wait()
        return self._addresses.result()

    async def stop(self, drain_s: float) -> None:
        """Lets running requests end within `drain_s`, then ends the process. To be called after `run` was cancelled."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError, TimeoutError):
            self._process.terminate()
            await asyncio.wait_for(self._process.wait(), drain_s + STOP_GRACE_S)
        await self.kill()

    async def kill(self) -> None:
        """Ends the process at once, if there is one."""
        if self._process is not None:
            await child.kill(self._process)

    async def _spawn(self) -> asyncio.subprocess.Process:
        config_end, our_end = os.pipe()
        try:
            # Far below the 64 KiB that a pipe holds, so the write does not wait for the reader.
            os.write(our_end, self._config.model_dump_json().encode())
            os.close(our_end)
            return await child.spawn_module(
                self._module, f"/dev/fd/{config_end}", pass_fds=[config_end], stdout=asyncio.subprocess.PIPE
            )
        finally:
            os.close(config_end)

    def _told(self, line: dict[str, Any]) -> None:
        if line.get("ready"):
            self._was_ready.set()
        elif not self._addresses.done():
            self._listening(line)

    def _listening(self, line: dict[str, str]) -> None:
        addresses = RouterAddresses(line["grpc"], line["http"])
        ports = {
            "grpc_port": int(addresses.grpc.rpartition(":")[2]),
            "http_port": int(addresses.http.rpartition(":")[2]),
        }
        # A port that was left to the system is kept by the next incarnation.
        self._config = self._config.model_copy(update={"router": self._config.router.model_copy(update=ports)})
        self._addresses.set_result(addresses)
