"""The sender's side of the KVTransfer service, without a thread of its own."""

from __future__ import annotations

import threading
from typing import Any

import grpc

from baton.internal.v1 import transfer_pb2, transfer_pb2_grpc
from kvtransfer.channel import channel_options

_MAX_MESSAGE_BYTES = 64 << 10
# How long a closing link waits for its last aborts. What does not get through is left to the receiver's lease.
_CLOSE_S = 1.0


class Aborts:
    """Abort by gRPC.

    Args:
        address: host:port of the KVTransfer service.
        timeout_s: longest time that one call may take.
    """

    def __init__(self, address: str, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._channel = grpc.insecure_channel(address, options=channel_options(_MAX_MESSAGE_BYTES))
        self._stub = transfer_pb2_grpc.KVTransferStub(self._channel)
        self._idle = threading.Condition()
        self._num_aborts = 0

    def abort(self, request: transfer_pb2.AbortRequest) -> None:
        with self._idle:
            self._num_aborts += 1
        self._stub.Abort.future(request, timeout=self._timeout_s).add_done_callback(self._aborted)

    def close(self) -> None:
        with self._idle:
            self._idle.wait_for(lambda: self._num_aborts == 0, timeout=_CLOSE_S)
        self._channel.close()

    def _aborted(self, call: Any) -> None:
        with self._idle:
            self._num_aborts -= 1
            self._idle.notify_all()
