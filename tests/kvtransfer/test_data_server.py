"""What the data plane makes of a peer that does not keep to the protocol."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from baton.internal.v1 import transfer_pb2
from kvtransfer.frame import HEADER_BYTES
from kvtransfer.ring import create_ring, unlink_ring
from kvtransfer.session import CALL_MAGIC
from kvtransfer.sources import OFFSET
from tests.kvtransfer.frames import A, B, frame_of, open_request, opened, payload_of
from tests.kvtransfer.grpc_stream import Stream
from tests.kvtransfer.sides import DecodeSide, small


@pytest.fixture
def decode() -> Iterator[DecodeSide]:
    side = DecodeSide(small("grpc"))
    yield side
    side.close()


def test_frames_are_acknowledged_in_number(decode: DecodeSide, stream: Stream) -> None:
    greeting = stream.hello()
    assert (greeting.max_payload_bytes, greeting.payload_error) == (1024, "")
    ticket = opened(decode, (0, 0, [5, 6]))
    payload = payload_of(2)
    one = frame_of(ticket, 0, 0, 0, 0, payload).pack() + payload.tobytes()
    two = frame_of(ticket, 1, 0, 1, 0, payload).pack() + payload.tobytes()
    assert stream.send(one + two).num_frames == 2
    assert decode.pages[1, [5, 6]].tobytes() == payload.tobytes()


def test_open_frames_and_commit_go_one_way(decode: DecodeSide, stream: Stream) -> None:
    def call(call: transfer_pb2.StreamCall) -> str:
        call.id = 7
        (answer,) = stream.send(CALL_MAGIC + call.SerializeToString()).answers
        assert answer.id == 7
        return answer.status

    stream.hello()
    ticket = decode.reserve(A, (1, 0, [5]))
    commit = transfer_pb2.StreamCall(
        commit=transfer_pb2.CommitRequest(
            ref=ticket.ref,
            reservation=ticket.reservation,
            num_frames=2,
            first_tokens=[
                transfer_pb2.FirstToken(choice=0, token_id=5),
                transfer_pb2.FirstToken(choice=1, finished=True),
            ],
        )
    )
    assert call(commit) == "FAILED_PRECONDITION"
    assert call(transfer_pb2.StreamCall(open=open_request(ticket))) == ""
    payload = payload_of(1)
    for slot in range(2):
        stream.send(frame_of(ticket, slot, 1, slot, 0, payload).pack() + payload.tobytes())
    assert call(commit) == ""
    assert decode.events.of(A) == ["committed"]
    assert [(t.choice, t.token_id, t.finished) for t in decode.events.first_tokens[A]] == [(0, 5, False), (1, 0, True)]


def test_a_refused_frame_is_told_and_the_stream_goes_on(decode: DecodeSide, stream: Stream) -> None:
    stream.hello()
    over = opened(decode, (0, 0, [5, 6]))
    decode.leader.release(A)
    ticket = opened(decode, (0, 0, [5, 6]), name=B)
    payload = payload_of(2)
    reply = stream.send(frame_of(over, 0, 0, 0, 0, payload).pack() + payload.tobytes())
    assert [(refusal.reservation, refusal.status) for refusal in reply.refusals] == [
        (over.reservation, "FAILED_PRECONDITION")
    ]
    reply = stream.send(frame_of(ticket, 0, 0, 0, 0, payload).pack() + payload.tobytes())
    assert (reply.num_frames, len(reply.refusals)) == (2, 0)


@pytest.mark.parametrize("changes", [{"worker": "decode-1"}, {"epoch": 2}, {"rank": 1}])
def test_a_hello_to_another_incarnation_is_refused(stream: Stream, changes: dict[str, object]) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        stream.hello(**changes)
    assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "this is decode-0 in epoch 1" in (raised.value.details() or "")


def test_a_stream_that_does_not_begin_with_a_hello_ends(stream: Stream) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        stream.send(b"\xff\xff\xff")
    assert raised.value.code() is grpc.StatusCode.ABORTED


@pytest.mark.parametrize("cut", [1, 40, HEADER_BYTES, 100])
def test_a_message_that_is_cut_off_ends_the_stream_and_writes_nothing(
    decode: DecodeSide, stream: Stream, cut: int
) -> None:
    stream.hello()
    ticket = opened(decode, (0, 0, [5, 6]))
    payload = payload_of(2)
    with pytest.raises(grpc.RpcError) as raised:
        stream.send((frame_of(ticket, 0, 0, 0, 0, payload).pack() + payload.tobytes())[:cut])
    assert raised.value.code() is grpc.StatusCode.ABORTED
    assert decode.pages.tobytes() == decode.before.tobytes()


def test_a_message_beyond_the_limit_ends_the_stream(stream: Stream) -> None:
    stream.hello()
    with pytest.raises(grpc.RpcError) as raised:
        stream.send(bytes(1 << 20))
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_payload_beyond_the_ring_ends_the_stream(decode: DecodeSide, stream: Stream) -> None:
    name, ring = create_ring(4096)
    try:
        assert stream.hello(ring_name=name, ring_bytes=4096).payload_error == ""
    finally:
        unlink_ring(name)
    ticket = opened(decode, (0, 0, [5, 6]))
    payload = payload_of(2)
    ring.view(3584, 512)[:] = payload
    assert stream.send(frame_of(ticket, 0, 0, 0, 0, payload).pack() + OFFSET.pack(3584)).num_frames == 1
    assert decode.pages[0, [5, 6]].tobytes() == payload.tobytes()
    with pytest.raises(grpc.RpcError) as raised:
        stream.send(frame_of(ticket, 1, 0, 1, 0, payload).pack() + OFFSET.pack(3585))
    assert raised.value.code() is grpc.StatusCode.ABORTED
    assert "beyond" in (raised.value.details() or "")


@pytest.mark.parametrize("name", ["../../etc/passwd", "baton-kv-1-0123456789abcdef"])
def test_a_ring_that_cannot_be_mapped_is_told(stream: Stream, name: str) -> None:
    reply = stream.hello(ring_name=name, ring_bytes=4096)
    assert reply.payload_error != ""
