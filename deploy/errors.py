"""Why `baton serve` ends without being asked to; the message is what the user reads, without a traceback."""

from __future__ import annotations

from typing import ClassVar


class ServeError(Exception):
    """Base of both.

    Attributes:
        exit_code: of the command.
    """

    exit_code: ClassVar[int] = 1


class StartError(ServeError):
    """The cluster cannot start as it was asked to."""

    exit_code = 2


class ClusterError(ServeError):
    """The cluster ran and cannot go on."""
