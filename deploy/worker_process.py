"""The process of one worker in the process runtime: forked by `deploy.fork_server`, or begun anew with FD as argument.

FD is a socket to the parent, with one JSON object in each line. In: {"actor", "config"}, then {"drain_s"} to stop. Out:
the report of the start. When the socket closes the parent is gone, and so is this process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import signal
import socket
import sys
import threading
from typing import NoReturn, TextIO

from deploy.hosting import HostedWorker


def run(parent: socket.socket) -> int:
    """Runs a worker as the parent orders, and returns the exit status."""
    # Ctrl-C is the parent's to handle.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lines = parent.makefile("r", encoding="utf-8")
    first = lines.readline()
    if not first:
        return 1
    order = json.loads(first)
    stops: queue.SimpleQueue[float] = queue.SimpleQueue()
    follower = threading.Thread(target=_follow_parent, args=(lines, stops), name="parent", daemon=True)
    worker = HostedWorker(order["actor"], json.dumps(order["config"]))
    # Not before: a process of several threads cannot fork its other ranks.
    report = worker.start(made=follower.start)
    parent.sendall(report.encode() + b"\n")
    if "error" in json.loads(report):
        return 1
    worker.stop(stops.get())
    return 0


def end(exit_code: int) -> NoReturn:
    """Ends the process at once: a worker stops all that it starts, and taking Torch apart would cost seconds."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(exit_code)


def _follow_parent(lines: TextIO, stops: queue.SimpleQueue[float]) -> None:
    # A parent that is killed before it has read the report resets the connection.
    with contextlib.suppress(ConnectionResetError):
        for line in lines:
            stops.put(json.loads(line)["drain_s"])
    os._exit(1)


if __name__ == "__main__":
    end(run(socket.socket(fileno=int(sys.argv[1]))))
