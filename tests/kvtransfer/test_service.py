"""The KVTransfer service over a real socket: it never blocks its event loop and answers with the right status."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from baton.config import TransferConfig
from baton.internal.v1 import transfer_pb2, transfer_pb2_grpc
from tests.kvtransfer.frames import A, B, fill, open_request
from tests.kvtransfer.sides import WAIT_S, DecodeSide, ref

Stub = transfer_pb2_grpc.KVTransferStub


@pytest.fixture
def timeout_s() -> float:
    return WAIT_S


@pytest.fixture
def decode(timeout_s: float) -> Iterator[DecodeSide]:
    side = DecodeSide(TransferConfig(transports=("grpc",), timeout_s=timeout_s))
    yield side
    side.close()


@pytest.fixture
def stub(decode: DecodeSide) -> Iterator[Stub]:
    with grpc.insecure_channel(decode.reserve(ref("probe")).control_address) as channel:
        yield Stub(channel)


def commit_request(ticket: transfer_pb2.Ticket, num_frames: int) -> transfer_pb2.CommitRequest:
    return transfer_pb2.CommitRequest(
        ref=ticket.ref,
        reservation=ticket.reservation,
        num_frames=num_frames,
        first_tokens=[transfer_pb2.FirstToken(choice=0, token_id=5), transfer_pb2.FirstToken(choice=1, finished=True)],
    )


def test_a_commit_waits_while_others_are_served(decode: DecodeSide, stub: Stub) -> None:
    waiting, other = decode.reserve(A, (1, 0, [5])), decode.reserve(B, (1, 0, [6]))
    stub.Open(open_request(waiting), timeout=WAIT_S)
    answer = stub.Commit.future(commit_request(waiting, 2), timeout=WAIT_S)
    stub.Open(open_request(other), timeout=WAIT_S)
    num_frames = fill(decode, other)
    stub.Commit(commit_request(other, num_frames), timeout=WAIT_S)
    assert not answer.done()

    fill(decode, waiting)
    assert answer.result(WAIT_S) == transfer_pb2.CommitResponse()
    assert decode.events.log == [("committed", B), ("committed", A)]
    assert [(t.choice, t.token_id, t.finished) for t in decode.events.first_tokens[A]] == [(0, 5, False), (1, 0, True)]


@pytest.mark.parametrize("timeout_s", [0.2])
def test_a_commit_whose_frames_do_not_come_is_aborted(decode: DecodeSide, stub: Stub) -> None:
    ticket = decode.reserve(A, (1, 0, [5]))
    stub.Open(open_request(ticket), timeout=WAIT_S)
    with pytest.raises(grpc.RpcError) as raised:
        stub.Commit(commit_request(ticket, 2), timeout=WAIT_S)
    assert raised.value.code() is grpc.StatusCode.ABORTED
    assert "did not arrive within 0.2 s" in (raised.value.details() or "")
    assert decode.events.of(A) == ["aborted"]


def test_a_commit_that_the_sender_gave_up_is_aborted(decode: DecodeSide, stub: Stub) -> None:
    ticket = decode.reserve(A, (1, 0, [5]))
    stub.Open(open_request(ticket), timeout=WAIT_S)
    answer = stub.Commit.future(commit_request(ticket, 2), timeout=WAIT_S)
    # The server takes calls of one connection in order, so Commit has arrived when this is answered.
    stub.Open(open_request(decode.reserve(B)), timeout=WAIT_S)
    answer.cancel()
    decode.events.wait("aborted", A)
    assert "gave up" in decode.events.reasons[A]


def test_abort_is_idempotent(decode: DecodeSide, stub: Stub) -> None:
    ticket = decode.reserve(A, (1, 0, [5]))
    request = transfer_pb2.AbortRequest(ref=ticket.ref, reservation=ticket.reservation, reason="why not")
    for _ in range(2):
        stub.Abort(request, timeout=WAIT_S)
    decode.receiver.release(A)
    stub.Abort(request, timeout=WAIT_S)
    assert decode.events.of(A) == ["aborted", "released"]


def test_errors_have_their_status(decode: DecodeSide, stub: Stub) -> None:
    ticket = decode.reserve(A, (1, 0, [5]))
    other_layout = transfer_pb2.LayoutFingerprint(model="another")
    for request, named in [
        (open_request(ticket, reservation=ticket.reservation + 1), "is over"),
        (open_request(ticket, layout=other_layout), "model is 'model' here and 'another' at the peer"),
    ]:
        with pytest.raises(grpc.RpcError) as raised:
            stub.Open(request, timeout=WAIT_S)
        assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert named in (raised.value.details() or "")
