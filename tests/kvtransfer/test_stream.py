"""When the sending end of a stream asks for acknowledgements, and what it waits for."""

from __future__ import annotations

import queue
from collections.abc import Iterator

import numpy as np
import pytest

from baton.errors import BatonError, UnavailableError
from baton.internal.v1 import transfer_pb2
from kvtransfer.frame import Frame
from kvtransfer.pages import HeadRange, HostPages
from kvtransfer.reservation import Origin
from kvtransfer.transports.base import WireSettings
from kvtransfer.transports.grpc import InlinePayloads
from kvtransfer.transports.stream import StreamWire
from tests.kvtransfer.sides import WAIT_S

PAGE_BYTES, WINDOW_BYTES = 512, 4096
HEADS = HeadRange(0, 1)


class ScriptedPipe:
    """Keeps what is sent; receives what the test puts into `replies`, and the end after None."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.replies: queue.SimpleQueue[transfer_pb2.StreamReply | None] = queue.SimpleQueue()
        self.replies.put(transfer_pb2.StreamReply(max_payload_bytes=PAGE_BYTES))

    def send(self, message: bytes) -> None:
        self.sent.append(message)

    def receive(self) -> bytes:
        reply = self.replies.get()
        if reply is None:
            raise UnavailableError("the stream has ended")
        return reply.SerializeToString()

    def end(self) -> None:
        self.replies.put(None)

    def close(self) -> None: ...


class Progress:
    """Wire events of which only progress is waited for."""

    def __init__(self) -> None:
        self.told: queue.SimpleQueue[None] = queue.SimpleQueue()

    def progressed(self) -> None:
        self.told.put(None)

    def refused(self, reservation: int, error: BatonError) -> None: ...

    def broken(self, error: BatonError) -> None: ...


@pytest.fixture
def pipe() -> ScriptedPipe:
    return ScriptedPipe()


@pytest.fixture
def progress() -> Progress:
    return Progress()


@pytest.fixture
def wire(pipe: ScriptedPipe, progress: Progress) -> Iterator[StreamWire]:
    settings = WireSettings(
        memory=HostPages(np.zeros((1, 2, PAGE_BYTES), dtype=np.uint8), HEADS),
        worker="decode-0",
        epoch=1,
        rank=0,
        control_address="",
        origin=Origin("prefill-0", 2),
        max_payload_bytes=PAGE_BYTES,
        window_bytes=WINDOW_BYTES,
        timeout_s=WAIT_S,
    )
    wire = StreamWire(pipe, "decode-0", settings, InlinePayloads(WINDOW_BYTES), progress)
    pipe.sent.clear()
    yield wire
    wire.close()


def send(wire: StreamWire, seq: int, *, acknowledge: bool) -> None:
    memory = HostPages(np.zeros((1, 2, PAGE_BYTES), dtype=np.uint8), HEADS)
    frame = Frame(7, 1, seq, 0, 0, HEADS.first, HEADS.count, seq, 1, PAGE_BYTES, acknowledge=acknowledge)
    wire.send(frame, memory, np.array([1], dtype=np.int64))


def test_each_half_of_the_room_is_asked_for(wire: StreamWire, pipe: ScriptedPipe) -> None:
    for seq in range(8):
        send(wire, seq, acknowledge=False)
    assert [Frame.unpack(message).acknowledge for message in pipe.sent] == [False, False, False, True] * 2
    assert not wire.has_room()


def test_only_what_was_asked_for_is_waited_for(wire: StreamWire, pipe: ScriptedPipe, progress: Progress) -> None:
    send(wire, 0, acknowledge=False)
    assert not wire.awaits_reply
    send(wire, 1, acknowledge=True)
    assert wire.awaits_reply
    pipe.replies.put(transfer_pb2.StreamReply(num_frames=2))
    progress.told.get(timeout=WAIT_S)
    assert not wire.awaits_reply
