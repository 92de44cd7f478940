"""A prefill side in a process of its own; `test_process` starts, feeds and kills it.

Reads one JSON line {"transports": [...], "ticket": hex, "source": [block ids], "hold_at": frame or null}, sends these
blocks of group 0 and commits. Prints "holding" when it stops at frame `hold_at`, for good, else how the push ended.
"""

from __future__ import annotations

import json
import sys
import threading

from baton.internal.v1 import transfer_pb2
from tests.kvtransfer import faults
from tests.kvtransfer.sides import PrefillSide, small


class Announcement(threading.Event):
    """Tells the parent what it is set for."""

    def set(self) -> None:
        print("holding", flush=True)


def main() -> None:
    order = json.loads(sys.stdin.readline())
    plan = faults.at(order["hold_at"], faults.hold(Announcement(), threading.Event()))
    config = small(*order["transports"])
    prefill = PrefillSide(config, worker="prefill-child", epoch=9, load=faults.FaultyTransports(plan))
    sending = prefill.open(transfer_pb2.Ticket.FromString(bytes.fromhex(order["ticket"])))
    sending.send_all(0, 0, order["source"])
    sending.commit()
    print(f"{sending.outcome()} by {sending.push.transport}", flush=True)
    prefill.close()


if __name__ == "__main__":
    main()
