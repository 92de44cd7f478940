"""A prefill side in a process of its own; `test_process` starts, feeds and kills it.

Reads one JSON line {"transports": [...], "ticket": hex, "source": [block ids], "hold_at": frame or null,
"on_gpu": bool}, sends these blocks of group 0 and commits. Prints "holding" when it stops at frame
`hold_at`, for good, else how the push ended.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

from baton.internal.v1 import transfer_pb2
from kvtransfer.transports import cuda_ipc
from tests.kvtransfer import faults
from tests.kvtransfer.gpu import gpu_memory
from tests.kvtransfer.sides import PrefillSide, small


@contextlib.contextmanager
def sending_process() -> Iterator[subprocess.Popen[str]]:
    """Starts one; it is killed at the end."""
    command = [sys.executable, "-m", __name__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def order(
    process: subprocess.Popen[str],
    ticket: transfer_pb2.Ticket,
    source: list[int],
    transport: str,
    *,
    hold_at: int | None = None,
    on_gpu: bool = False,
) -> str:
    """Tells the process what to send and reads what it prints."""
    assert process.stdin is not None
    assert process.stdout is not None
    message = {
        "ticket": ticket.SerializeToString().hex(),
        "source": source,
        # Loopback is first, and must not be taken.
        "transports": ["loopback", transport],
        "hold_at": hold_at,
        "on_gpu": on_gpu,
    }
    process.stdin.write(json.dumps(message) + "\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


class Announcement(threading.Event):
    """Tells the parent what it is set for."""

    def set(self) -> None:
        print("holding", flush=True)


def main() -> None:
    cuda_ipc.MAX_HEADS = 4
    order = json.loads(sys.stdin.readline())
    plan = faults.at(order["hold_at"], faults.hold(Announcement(), threading.Event()))
    config = small(*order["transports"])
    on_gpu: dict[str, Any] = {"make_memory": gpu_memory, "on_device": False} if order["on_gpu"] else {}
    prefill = PrefillSide(config, worker="prefill-child", epoch=9, load=faults.FaultyTransports(plan), **on_gpu)
    sending = prefill.open(transfer_pb2.Ticket.FromString(bytes.fromhex(order["ticket"])))
    sending.send_all(0, 0, order["source"])
    sending.commit()
    print(f"{sending.outcome()} by {sending.push.transport}", flush=True)
    prefill.close()


if __name__ == "__main__":
    main()
