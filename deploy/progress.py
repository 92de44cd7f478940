"""What `baton serve` tells the person, or the script, that started it."""

from __future__ import annotations

import logging
import time

from rich.console import Console
from rich.text import Text

from deploy.router_process import RouterAddresses

_log = logging.getLogger(__name__)


class Progress:
    """Steps go to stderr, each with the seconds since the start.

    Stdout has one line when the first request can be served, and one when all workers are up.

    Args:
        as_records: log the steps instead, so that stderr has nothing but log records.
    """

    def __init__(self, out: Console, err: Console, *, as_records: bool = False) -> None:
        self._out = out
        self._err = err
        self._as_records = as_records
        self._started = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started

    def step(self, text: str) -> None:
        if self._as_records:
            _log.info(text)
            return
        # Not as markup: texts of errors may hold brackets.
        self._err.print(Text.assemble((f"{self.elapsed_s:6.1f} s  ", "dim"), text), soft_wrap=True)

    def ready(self, addresses: RouterAddresses) -> None:
        """The first request can be served."""
        text = f"ready in {self.elapsed_s:.1f} s: gRPC {addresses.grpc}, HTTP {addresses.http}"
        self._out.print(Text(text, "bold green"), soft_wrap=True)

    def complete(self, num_workers: int) -> None:
        """Every worker has come up."""
        self._out.print(Text(f"all {num_workers} workers are up"), soft_wrap=True)
