"""The data plane of one host: calls in line with frames, and what it makes of a peer that breaks the protocol."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from baton.errors import UnavailableError
from baton.internal.v1 import transfer_pb2
from kvtransfer.frame import HEADER_BYTES, Frame
from kvtransfer.ring import create_ring, unlink_ring
from kvtransfer.session import CALL_MAGIC
from kvtransfer.socket_server import MAX_MESSAGE_BYTES, abstract
from kvtransfer.sources import OFFSET
from kvtransfer.transports.base import TransportUnavailableError
from kvtransfer.transports.shm import SocketPipe
from kvtransfer.transports.stream import MAX_FRAMES
from tests.kvtransfer.frames import A, abort, frame_of, in_thread, open_request, opened, payload_of
from tests.kvtransfer.sides import WAIT_S, DecodeSide, ref, small

RING_BYTES = 4096


class Stream:
    """The sending side, message by message."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(WAIT_S)
        self.socket.connect(abstract(address))
        self._num_calls = 0

    def send(self, message: bytes) -> transfer_pb2.StreamReply:
        self.socket.send(message)
        return transfer_pb2.StreamReply.FromString(self.socket.recv(MAX_MESSAGE_BYTES))

    def hello(self, ring_name: str, **changes: object) -> transfer_pb2.StreamReply:
        fields = {"worker": "decode-0", "epoch": 1, "sender": "prefill-0", "sender_epoch": 2, "ring_name": ring_name}
        hello = transfer_pb2.StreamHello(**fields | {"ring_bytes": RING_BYTES} | changes)  # type: ignore[arg-type]
        return self.send(hello.SerializeToString())

    def call(self, call: transfer_pb2.StreamCall) -> transfer_pb2.CallAnswer:
        self._num_calls += 1
        call.id = self._num_calls
        (answer,) = self.send(CALL_MAGIC + call.SerializeToString()).answers
        assert answer.id == call.id
        return answer

    def commit(self, ticket: transfer_pb2.Ticket, num_frames: int) -> transfer_pb2.CallAnswer:
        request = transfer_pb2.CommitRequest(ref=ticket.ref, reservation=ticket.reservation, num_frames=num_frames)
        return self.call(transfer_pb2.StreamCall(commit=request))


@pytest.fixture
def decode() -> Iterator[DecodeSide]:
    side = DecodeSide(small("shm"))
    yield side
    side.close()


@pytest.fixture
def address(decode: DecodeSide) -> str:
    return decode.reserve(ref("probe")).shards[0].offers[0].address


@pytest.fixture
def stream(address: str) -> Iterator[Stream]:
    stream = Stream(address)
    yield stream
    stream.socket.close()


@pytest.fixture
def ring_name() -> Iterator[str]:
    name, ring = create_ring(RING_BYTES)
    ring.view(0, 1536)[:] = payload_of(6)
    yield name
    unlink_ring(name)


def frames(ticket: transfer_pb2.Ticket) -> list[bytes]:
    """One for each slot of group 1, whose payloads lie behind each other in the ring."""
    payload = payload_of(6)
    return [
        frame_of(ticket, slot, 1, slot, 0, payload[slot * 512 : slot * 512 + 512]).pack() + OFFSET.pack(slot * 512)
        for slot in range(2)
    ]


def test_open_frames_and_commit_go_one_way(decode: DecodeSide, stream: Stream, ring_name: str) -> None:
    assert stream.hello(ring_name).payload_error == ""
    ticket = decode.reserve(A, (1, 0, [5, 6]))
    assert stream.call(transfer_pb2.StreamCall(open=open_request(ticket))).status == ""
    assert stream.send(b"".join(frames(ticket))).num_frames == 2
    assert stream.commit(ticket, 2).status == ""
    assert decode.events.of(A) == ["committed"]
    assert decode.pages[:2, [5, 6]].tobytes() == payload_of(6)[:1024].tobytes()


def test_a_frame_gets_a_reply_if_it_asks_for_one_or_is_refused(
    decode: DecodeSide, stream: Stream, ring_name: str
) -> None:
    stream.hello(ring_name)
    first, second = frames(opened(decode, (1, 0, [5, 6])))
    unasking = Frame.unpack(first)._replace(acknowledge=False).pack() + first[HEADER_BYTES:]
    stream.socket.send(unasking)
    assert stream.send(second).num_frames == 2
    refused = stream.send(unasking)
    assert (refused.num_frames, len(refused.refusals)) == (3, 1)


def test_a_call_that_is_refused_says_why_and_the_stream_goes_on(
    decode: DecodeSide, stream: Stream, ring_name: str
) -> None:
    stream.hello(ring_name)
    over = decode.reserve(A, (1, 0, [5, 6]))
    decode.leader.release(A)
    answer = stream.call(transfer_pb2.StreamCall(open=open_request(over)))
    assert (answer.status, "is over" in answer.message) == ("FAILED_PRECONDITION", True)
    assert stream.commit(over, 0).status == "FAILED_PRECONDITION"
    assert stream.commit(opened(decode), 0).status == ""


def test_a_commit_does_not_wait_for_frames_that_did_not_come_before_it(
    decode: DecodeSide, stream: Stream, ring_name: str
) -> None:
    stream.hello(ring_name)
    ticket = opened(decode, (1, 0, [5, 6]))
    stream.send(frames(ticket)[0])
    answer = stream.commit(ticket, 2)
    assert answer.status == "ABORTED"
    assert answer.message == "committed 2 frames; 1 arrived and 2 pages are missing"
    assert decode.events.of(A) == ["aborted"]
    late = stream.send(frames(ticket)[1])
    assert [refusal.status for refusal in late.refusals] == ["ABORTED"]


def test_a_commit_after_an_abort_says_so(decode: DecodeSide, stream: Stream, ring_name: str) -> None:
    stream.hello(ring_name)
    ticket = opened(decode, (1, 0, [5, 6]))
    abort(decode, ticket, "cancelled")
    assert stream.commit(ticket, 0).message == "aborted: cancelled"


@pytest.mark.parametrize("changes", [{"worker": "decode-1"}, {"epoch": 2}, {"rank": 1}])
def test_a_hello_to_another_incarnation_is_refused(stream: Stream, ring_name: str, changes: dict[str, object]) -> None:
    reply = stream.hello(ring_name, **changes)
    assert reply.status == "FAILED_PRECONDITION"
    assert "this is decode-0 in epoch 1" in reply.message
    assert stream.socket.recv(1) == b""


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (bytes(MAX_MESSAGE_BYTES + 1), "more than 65536 bytes"),
        (b"\x80\x04" + bytes(60), "begins with"),
        (CALL_MAGIC + b"\xff", "a call is none"),
    ],
)
def test_a_message_that_is_none_ends_the_stream(
    decode: DecodeSide, stream: Stream, ring_name: str, message: bytes, problem: str
) -> None:
    stream.hello(ring_name)
    reply = stream.send(message)
    assert (reply.status, problem in reply.message) == ("ABORTED", True)
    assert stream.socket.recv(1) == b""
    assert decode.pages.tobytes() == decode.before.tobytes()


def test_the_socket_goes_with_its_receiver(decode: DecodeSide, address: str) -> None:
    idle = Stream(address)
    decode.close()
    with pytest.raises(UnavailableError, match="cannot be reached"):
        SocketPipe(address, WAIT_S)
    assert idle.socket.recv(1) == b""
    idle.socket.close()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        # Linux chooses a name.
        listener.bind("")
        listener.listen()
        yield listener


def name_of(listener: socket.socket) -> str:
    name: bytes = listener.getsockname()
    return "@" + name[1:].decode()


def test_messages_wait_for_a_receiver_that_is_behind(listener: socket.socket) -> None:
    # The socket holds a few of these.
    sent = [bytes([index]) * 32000 for index in range(MAX_FRAMES)]
    pipe = SocketPipe(name_of(listener), WAIT_S)

    def send_all() -> None:
        for message in sent:
            pipe.send(message)

    sending = in_thread(send_all)
    connection, _ = listener.accept()
    with connection:
        assert [connection.recv(MAX_MESSAGE_BYTES) for _ in sent] == sent
    sending.join()
    pipe.close()


def test_a_receiver_that_stays_behind_ends_the_stream(listener: socket.socket) -> None:
    pipe = SocketPipe(name_of(listener), 0.05)
    for _ in range(MAX_FRAMES):
        pipe.send(bytes(32000))
    with pytest.raises(UnavailableError):
        pipe.receive()
    pipe.close()


def test_neither_end_speaks_to_another_user(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    another = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: another)
    refused = Stream(address)
    assert refused.socket.recv(1) == b""
    refused.socket.close()
    with pytest.raises(TransportUnavailableError, match="another user's"):
        SocketPipe(address, WAIT_S)
