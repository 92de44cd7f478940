"""Worker actors without a model; `served_name` of their config says how they behave."""

from __future__ import annotations

import os
import pathlib
import sys
import threading
from collections.abc import Mapping

from baton.config import Role, WorkerConfig
from baton.internal.v1 import worker_pb2

ACTORS: Mapping[Role, str] = {
    "prefill": "tests.deploy.fake_actors:FakeActor",
    "decode": "tests.deploy.fake_actors:FakeActor",
}


class FakeActor:
    """Leaves a file for each call in its model's folder: NAME.started, NAME.drained (the timeout), NAME.stopped.

    NAME.flavour is what the environment has under FLAVOUR.
    """

    def __init__(self, config_json: str) -> None:
        self._config = WorkerConfig.model_validate_json(config_json)

    def start(self) -> bytes:
        config = self._config
        if flavour := os.environ.get("FLAVOUR"):
            self._write("flavour", flavour)
        self._write("started", str(os.getpid()))
        match config.model.served_name:
            case "refuses":
                raise ValueError("architecture 'bert' is not decoder-only")
            case "has a bug":
                raise KeyError("layers")
            case "dies":
                os._exit(3)
            case "hangs":
                threading.Event().wait()
            case "prints":
                print("noise")
                sys.stdout.flush()
        return worker_pb2.WorkerInfo(
            role=config.role,
            name=config.name,
            epoch=config.epoch,
            pid=os.getpid(),
            address="127.0.0.1:1",
            metrics_address="http://127.0.0.1:2/metrics",
        ).SerializeToString()

    def drain(self, timeout_s: float) -> None:
        self._write("drained", str(timeout_s))
        if self._config.model.served_name == "never drains":
            threading.Event().wait()

    def stop(self) -> None:
        self._write("stopped", "")

    def _write(self, event: str, text: str) -> None:
        pathlib.Path(self._config.model.path, f"{self._config.name}.{event}").write_text(text)
