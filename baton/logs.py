"""Logging of every process: one record a line, on stderr, with the request's name where it is about one.

    2026-01-31 12:00:00.123 WARNING router.accounting [chat-7 (7c9e…/2)] prefill-0 is gone; trying again
    2026-01-31 12:00:00.123 INFO    decode-0 engine.engine loaded /models/llama: 32 layers, …

or, as JSON, one object with time, level, logger, message, role and, where they apply, worker, request_id, internal_id,
attempt, trace_id and exception.

Modules log through `logging.getLogger(__name__)`. A record names its request by `extra={"request": name}`, else it is
about the request that its task has named by `about`.
"""

from __future__ import annotations

import contextvars
import dataclasses
import datetime
import json
import logging
import re
import sys
import threading
import traceback
from typing import Any

from baton.config import LogConfig

# Libraries that say more than anybody wants to read, at least from this level on.
_CHATTY = ("asyncio", "filelock", "grpc", "h11", "numba", "opentelemetry", "ray", "transformers", "urllib3", "uvicorn")

# Control characters but the tab, and what else ends a line.
_CONTROL = re.compile("[\x00-\x08\n-\x1f\x7f-\x9f\u2028\u2029]")
_CONTROL_IN_LINES = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")

_current: contextvars.ContextVar[object | None] = contextvars.ContextVar("request", default=None)


@dataclasses.dataclass(frozen=True, slots=True)
class RequestName:
    """A request as log lines name it.

    Attributes:
        request_id: the client's name for it; workers do not know it.
        internal_id, attempt: what router and workers call it.
        trace_id: in hexadecimal; empty where nothing is traced.
    """

    internal_id: str
    attempt: int
    request_id: str = ""
    trace_id: str = ""

    def __str__(self) -> str:
        inside = f"{self.internal_id}/{self.attempt}"
        return f"{self.request_id} ({inside})" if self.request_id else inside

    def fields(self) -> dict[str, Any]:
        """What there is, for a JSON object."""
        found = {
            "request_id": self.request_id,
            "internal_id": self.internal_id,
            "attempt": self.attempt,
            "trace_id": self.trace_id,
        }
        return {key: value for key, value in found.items() if value}


def about(request: RequestName | str) -> None:
    """Names the request that the current task, and the tasks that it starts, are about."""
    _current.set(request)


def configure(config: LogConfig, *, role: str, worker: str = "") -> None:
    """Sends all records of at least the configured level to stderr; once a process.

    Args:
        role: of the process: serve, supervisor, router, prefill or decode.
        worker: its name, where it is a worker.
    """
    formatter = JsonFormatter(role, worker) if config.format == "json" else RequestFormatter(worker)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    level = logging.getLevelNamesMapping()[config.level.upper()]
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in _CHATTY:
        # Whatever handlers and levels a library has given itself.
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(max(level, logging.WARNING))
    if config.format == "json":
        _log_uncaught()


class RequestFormatter(logging.Formatter):
    """For people: time, level, worker (if any), logger, request (if any) and message."""

    default_msec_format = "%s.%03d"

    def __init__(self, worker: str = "") -> None:
        super().__init__()
        self._process = f"{worker} " if worker else ""

    def format(self, record: logging.LogRecord) -> str:
        request = _request_of(record)
        subject = f" [{request}]" if request else ""
        beginning = f"{self.formatTime(record)} {record.levelname:<7} {self._process}{record.name}{subject}"
        # What clients send may stand in both: it must not begin a line, nor move a terminal's cursor.
        line = _CONTROL.sub(_escape, f"{beginning} {record.getMessage()}")
        if record.exc_info:
            line += "\n" + _CONTROL_IN_LINES.sub(_escape, self.formatException(record.exc_info))
        return line


class JsonFormatter(logging.Formatter):
    """For collectors: one JSON object a line, also for a record with an exception."""

    def __init__(self, role: str, worker: str = "") -> None:
        super().__init__()
        self._process = {"role": role, **({"worker": worker} if worker else {})}

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        fields: dict[str, Any] = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._process,
        }
        request = _request_of(record)
        if isinstance(request, RequestName):
            fields |= request.fields()
        elif request:
            fields["request_id"] = str(request)
        if record.exc_info and record.exc_info[1] is not None:
            kind, error, _ = record.exc_info
            fields["exception"] = {
                "type": kind.__name__ if kind else "",
                "message": str(error),
                "stack": "".join(traceback.format_exception(error)),
            }
        return json.dumps(fields, ensure_ascii=False)


def _escape(found: re.Match[str]) -> str:
    return repr(found[0])[1:-1]


def _request_of(record: logging.LogRecord) -> object | None:
    return getattr(record, "request", None) or _current.get()


def _log_uncaught() -> None:
    """Lets what nobody caught be a record too, instead of many lines."""
    log = logging.getLogger(__name__)

    def uncaught(kind: type[BaseException], error: BaseException, stack: Any) -> None:
        if issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, error, stack)
        else:
            log.critical("uncaught", exc_info=(kind, error, stack))

    def uncaught_in_thread(problem: threading.ExceptHookArgs) -> None:
        if problem.exc_value is not None and not issubclass(problem.exc_type, SystemExit):
            log.critical("uncaught", exc_info=(problem.exc_type, problem.exc_value, problem.exc_traceback))

    sys.excepthook = uncaught
    threading.excepthook = uncaught_in_thread
