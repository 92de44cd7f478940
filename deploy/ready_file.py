"""The file that tells scripts where a cluster is: `baton serve --ready-file PATH`."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Sequence

from baton.internal.v1 import worker_pb2
from deploy.router_process import RouterAddresses


class ReadyFile:
    """Exists exactly while the cluster can serve, always whole; a file that an earlier run left is removed at once."""

    def __init__(self, path: str) -> None:
        self._path = pathlib.Path(path)
        self.remove()

    def write(self, addresses: RouterAddresses, workers: Sequence[worker_pb2.WorkerInfo]) -> None:
        """Puts the file in place, or a new one in place of the old."""
        content = {
            "grpc": addresses.grpc,
            "http": addresses.http,
            "workers": [
                {
                    "role": worker.role,
                    "name": worker.name,
                    "pid": worker.pid,
                    "address": worker.address,
                    "metrics": worker.metrics_address,
                }
                for worker in workers
            ],
        }
        unfinished = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        unfinished.write_text(json.dumps(content, indent=2) + "\n")
        unfinished.replace(self._path)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)
