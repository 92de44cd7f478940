"""Logging of every process: one human-readable line a record, on stderr, with the request's id where there is one.

    2026-01-31 12:00:00.123 WARNING router.pipeline [7c9e…/2] prefill-0 is gone; trying again

Modules log through `logging.getLogger(__name__)`; a record names its request by `extra={"request": id}`.
"""

from __future__ import annotations

import logging
import sys


class RequestFormatter(logging.Formatter):
    """Time, level, logger, request (if any) and message."""

    default_msec_format = "%s.%03d"

    def format(self, record: logging.LogRecord) -> str:
        request = getattr(record, "request", None)
        subject = f" [{request}]" if request else ""
        line = f"{self.formatTime(record)} {record.levelname:<7} {record.name}{subject} {record.getMessage()}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def configure(level: str) -> None:
    """Sends all records of at least `level` ("debug", "info", "warning", "error") to stderr; call once a process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(RequestFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
