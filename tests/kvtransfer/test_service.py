"""The KVTransfer service over a real socket."""

from __future__ import annotations

import grpc

from baton.config import TransferConfig
from baton.internal.v1 import transfer_pb2, transfer_pb2_grpc
from tests.kvtransfer.frames import A
from tests.kvtransfer.sides import WAIT_S, DecodeSide


def test_abort_is_idempotent() -> None:
    decode = DecodeSide(TransferConfig(transports=("grpc",)))
    ticket = decode.reserve(A, (1, 0, [5]))
    request = transfer_pb2.AbortRequest(ref=ticket.ref, reservation=ticket.reservation, reason="why not")
    with grpc.insecure_channel(ticket.control_address) as channel:
        stub = transfer_pb2_grpc.KVTransferStub(channel)
        for _ in range(2):
            stub.Abort(request, timeout=WAIT_S)
        decode.leader.release(A)
        stub.Abort(request, timeout=WAIT_S)
    decode.close()
    assert decode.events.of(A) == ["aborted", "released"]
