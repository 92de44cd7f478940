"""Forks followers for tests, having imported what they need once: `python -m tests.worker.ranks.forker FD`.

FD is a packet socket. A packet in has a follower's two sockets along with it; the packet out is its pid. A follower
that ends is waited for by the forker, whose end ends them all.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

from baton import tether
from worker.ranks import follower


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    # The kernel collects children whose end nobody asks for.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    own_pid = os.getpid()
    while True:
        packet, descriptors, _, _ = socket.recv_fds(control, 16, 2)
        if not packet:
            return
        sockets = [socket.socket(fileno=descriptor) for descriptor in descriptors]
        pid = os.fork()
        if not pid:
            control.close()
            follower.end(follower.run(sockets) if tether.tie(own_pid) else 1)
        for end in sockets:
            end.close()
        control.send(str(pid).encode())


if __name__ == "__main__":
    main()
