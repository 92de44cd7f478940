"""The sender's side of the KVTransfer service, without a thread of its own: answers come from gRPC's threads."""

from __future__ import annotations

import functools
import threading
from typing import Any

import grpc

from baton.internal.v1 import transfer_pb2, transfer_pb2_grpc
from kvtransfer.channel import channel_options, rpc_failure
from kvtransfer.reservation import Answer

# Requests are small but for first tokens: 16 bytes for each choice.
_MAX_MESSAGE_BYTES = 1 << 20
# How long a closing link waits for its last aborts. What does not get through is left to the receiver's lease.
_CLOSE_S = 1.0


class GrpcControl:
    """Open, Commit and Abort by gRPC.

    Args:
        address: host:port of the KVTransfer service.
        timeout_s: longest time that one call may take.
    """

    def __init__(self, address: str, timeout_s: float) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._channel = grpc.insecure_channel(address, options=channel_options(_MAX_MESSAGE_BYTES))
        self._stub = transfer_pb2_grpc.KVTransferStub(self._channel)
        self._idle = threading.Condition()
        self._num_aborts = 0

    def open(self, request: transfer_pb2.OpenRequest, answer: Answer) -> None:
        self._call(self._stub.Open.future(request, timeout=self._timeout_s), answer)

    def commit(self, request: transfer_pb2.CommitRequest, answer: Answer) -> None:
        self._call(self._stub.Commit.future(request, timeout=self._timeout_s), answer)

    def abort(self, request: transfer_pb2.AbortRequest) -> None:
        with self._idle:
            self._num_aborts += 1
        self._stub.Abort.future(request, timeout=self._timeout_s).add_done_callback(self._aborted)

    def close(self) -> None:
        with self._idle:
            self._idle.wait_for(lambda: self._num_aborts == 0, timeout=_CLOSE_S)
        self._channel.close()

    def _call(self, call: Any, answer: Answer) -> None:
        call.add_done_callback(functools.partial(self._answered, answer))

    def _answered(self, answer: Answer, call: Any) -> None:
        answer(None if call.code() is grpc.StatusCode.OK else rpc_failure(self._address, call))

    def _aborted(self, call: Any) -> None:
        with self._idle:
            self._num_aborts -= 1
            self._idle.notify_all()
