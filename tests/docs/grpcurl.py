"""Does what grpcurl would: knows nothing but the address, and asks the server what it can be called with."""

from __future__ import annotations

import argparse

import grpc

from tests.docs.workplace import Workplace
from tests.reflection import ReflectedServer


def run(words: list[str], workplace: Workplace) -> None:
    """Lists, describes or calls; an unknown flag, name or field fails."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("-plaintext", action="store_true", required=True)
    parser.add_argument("-d", default="{}")
    parser.add_argument("-H", action="append", default=[])
    parser.add_argument("-max-time", type=float, default=30.0)
    parser.add_argument("target")
    parser.add_argument("verb")
    parser.add_argument("symbol", nargs="?")
    given = parser.parse_args(words[1:])
    with grpc.insecure_channel(workplace.rewrite(given.target)) as channel:
        server = ReflectedServer(channel)
        if given.verb == "list":
            assert server.methods(given.symbol) if given.symbol else server.services()
        elif given.verb == "describe":
            assert server.knows(given.symbol)
        else:
            metadata = [(name, value) for name, _, value in (header.partition(": ") for header in given.H)]
            assert server.call(given.verb, given.d, metadata=metadata, timeout_s=given.max_time)
