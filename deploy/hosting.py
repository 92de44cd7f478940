"""One worker inside the process that runs it: what `deploy.worker_process` and the Ray actor have in common.

The report of a start crosses a socket or Ray as one line of JSON: {"info": base64 of a serialised WorkerInfo} or
{"error": text}.
"""

from __future__ import annotations

import base64
import gc
import importlib
import json
import logging
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Protocol, cast

from baton import logs
from baton.config import Role, WorkerConfig
from baton.errors import BatonError
from baton.internal.v1 import worker_pb2
from deploy.environment import set_worker_environment
from deploy.errors import StartError

ACTORS: Mapping[Role, str] = {
    "prefill": "prefill_worker.actor:PrefillActor",
    "decode": "decode_worker.actor:DecodeActor",
}

_log = logging.getLogger(__name__)


class WorkerActor(Protocol):
    """A worker as its package offers it; made from the JSON of its `WorkerConfig`, on a thread that lasts as long."""

    def start(self) -> bytes:
        """Loads the model, listens, and returns a serialised WorkerInfo.

        Raises:
            ValueError, BatonError: it cannot; the text is for the user.
        """

    def drain(self, timeout_s: float) -> None:
        """Takes no new request and returns when none runs, or after `timeout_s`."""

    def stop(self) -> None:
        """Ends everything; idempotent."""


class HostedWorker:
    """Makes, starts and stops the actor that `actor` ("module:Class") names."""

    def __init__(self, actor: str, config_json: str) -> None:
        self._path = actor
        self._config_json = config_json
        self._actor: WorkerActor | None = None

    def start(self, made: Callable[[], None] = lambda: None) -> str:
        """Starts the actor, blocking, and returns the report; never raises, so that every failure has one way out.

        Args:
            made: called when the actor is made, and before it starts: while it is made it may fork.
        """
        try:
            set_worker_environment()
            config = WorkerConfig.model_validate_json(self._config_json)
            logs.configure(config.log, role=config.role, worker=config.name)
            self._actor = _load(self._path)(self._config_json)
            made()
            return json.dumps({"info": base64.b64encode(self._actor.start()).decode()})
        except (ValueError, BatonError) as error:
            return json.dumps({"error": str(error)})
        except Exception as error:
            _log.exception("the worker could not start")
            return json.dumps({"error": f"{type(error).__name__}: {error}"})

    def stop(self, drain_s: float) -> None:
        """Lets running requests end within `drain_s`, then stops the actor."""
        if self._actor is not None:
            self._actor.drain(drain_s)
            self._actor.stop()


def read_report(name: str, report: str | bytes) -> worker_pb2.WorkerInfo:
    """What the start of worker `name` came to.

    Raises:
        StartError: it failed.
    """
    parsed = json.loads(report)
    if "error" in parsed:
        raise StartError(f"{name}: {parsed['error']}")
    return worker_pb2.WorkerInfo.FromString(base64.b64decode(parsed["info"]))


def import_quickly(module: str) -> ModuleType:
    """Imports a module without collecting garbage, which takes a seventh of the time: what modules make stays."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(module)
    finally:
        if was_enabled:
            gc.enable()


def _load(path: str) -> Callable[[str], WorkerActor]:
    module, _, name = path.partition(":")
    return cast("Callable[[str], WorkerActor]", getattr(import_quickly(module), name))
