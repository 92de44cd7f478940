"""The sending side of a stream over gRPC, by hand."""

from __future__ import annotations

import queue

import grpc

from baton.internal.v1 import transfer_pb2
from kvtransfer.data_server import METHOD
from tests.kvtransfer.sides import WAIT_S

HELLO = {"worker": "decode-0", "epoch": 1, "sender": "prefill-0", "sender_epoch": 2}


class Stream:
    """Message by message."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        stream: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(METHOD)
        self._call = stream(iter(self._outbox.get, None), timeout=WAIT_S)

    def send(self, message: bytes) -> transfer_pb2.StreamReply:
        self._outbox.put(message)
        return transfer_pb2.StreamReply.FromString(next(self._call))

    def hello(self, **changes: object) -> transfer_pb2.StreamReply:
        return self.send(transfer_pb2.StreamHello(**HELLO | changes).SerializeToString())  # type: ignore[arg-type]

    def close(self) -> None:
        self._outbox.put(None)
