"""The sending end of the data plane's stream, which all transports between processes share.

One stream carries all frames of a link: hello first, then messages of one or more frames; replies acknowledge them. The
transports differ in the pipe that carries messages, and in how payloads pass: behind their headers, in a ring, in a
group of `torch.distributed`, or not at all, where the receiver reads the sender's pool.

Threads: the link's thread calls; one thread reads replies.
"""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable
from typing import Protocol

from google.protobuf.message import DecodeError

from baton.errors import BatonError, TransferError, UnavailableError, from_status
from baton.internal.v1 import transfer_pb2
from kvtransfer.control import Aborts
from kvtransfer.frame import Frame
from kvtransfer.pages import BlockIds, PageMemory
from kvtransfer.ring import RingSpace
from kvtransfer.session import CALL_MAGIC
from kvtransfer.transports.base import Answer, TransportUnavailableError, WireEvents, WireSettings

# Frames that may be under way, so that replies and short messages find room in any socket's buffers and nobody waits.
MAX_FRAMES = 128


class Pipe(Protocol):
    """Whole messages to and from one receiver, in order."""

    def send(self, message: bytes) -> None:
        """Waits for room, for a limited time. What a broken pipe does not take is lost; `receive` tells."""

    def receive(self) -> bytes:
        """Waits for a message; raises BatonError when no more will come."""

    def end(self) -> None:
        """Wakes up whoever receives. Idempotent."""

    def close(self) -> None:
        """Comes last, when nobody sends or receives. Idempotent."""


class Payloads(Protocol):
    """How the payloads of frames pass: the other end of a receiver's `Source`."""

    @property
    def capacity_bytes(self) -> int:
        """How much may be under way."""

    def max_message_bytes(self, max_payload_bytes: int) -> int:
        """Largest message of several frames, given the largest payload of one; 0 where each frame goes at once."""

    def put(self, frame: Frame, memory: PageMemory, block_ids: BlockIds, position: int) -> bytes:
        """Takes the pages, to `position` of [0, capacity_bytes), and returns what goes into the message."""

    def announce(self, hello: transfer_pb2.StreamHello) -> None:
        """Says in the hello how they pass."""

    def settle(self) -> None:
        """The receiver has answered the hello, or never will."""

    def withdraw(self, reservation: int) -> None:
        """What was put for this reservation may change where it lies, if it lies there still."""

    def close(self) -> None:
        """Nothing will be put any more, and what was put need not arrive. Idempotent."""


class StreamWire:
    """One stream to a receiver; closes `pipe` at its end.

    Args:
        address: names the receiver in errors.

    Raises what `Transport.connect` does.
    """

    def __init__(
        self, pipe: Pipe, address: str, settings: WireSettings, payloads: Payloads, events: WireEvents
    ) -> None:
        self.max_payload_bytes = settings.max_payload_bytes
        self._pipe = pipe
        self._address = address
        self._payloads = payloads
        self._events = events
        self._lock = threading.Lock()
        self._space = RingSpace(payloads.capacity_bytes)
        self._num_frames = 0
        self._num_acknowledged = 0
        # Frames up to the last one that is to be acknowledged, and payload that was sent since.
        self._num_asked = 0
        self._unasked_bytes = 0
        # Calls that wait for their answers.
        self._calls: dict[int, Callable[[transfer_pb2.CallAnswer], None]] = {}
        self._num_calls = 0
        # Until the way can be gone, that it cannot is told by whoever connects; and what broke it, once it is broken.
        self._is_connected = False
        self._failure: BatonError | None = None
        self._closing = False
        # Frames of the message that is being filled: small ones may share one.
        self._message: list[bytes] = []
        self._message_bytes = 0
        self._message_payload_bytes = 0
        self._max_message_bytes = payloads.max_message_bytes(self.max_payload_bytes)
        hello = transfer_pb2.StreamHello(
            worker=settings.worker,
            epoch=settings.epoch,
            rank=settings.rank,
            sender=settings.origin.sender,
            sender_epoch=settings.origin.epoch,
            sender_rank=settings.origin.rank,
        )
        payloads.announce(hello)
        # What the link's thread waits for: the answer to the hello, then those that it asks for, or why none will come.
        self._awaited: queue.SimpleQueue[transfer_pb2.StreamReply | transfer_pb2.CallAnswer | BatonError]
        self._awaited = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name=f"kv-replies-{settings.worker}", daemon=True)
        self._reader.start()
        pipe.send(hello.SerializeToString())
        try:
            self._greet(settings.timeout_s)
        except BatonError:
            self.close()
            raise

    @property
    def awaits_reply(self) -> bool:
        with self._lock:
            return self._num_acknowledged < self._num_asked or len(self._calls) > 0

    def has_room(self) -> bool:
        with self._lock:
            return self._has_room()

    def send(self, frame: Frame, memory: PageMemory, block_ids: BlockIds) -> None:
        with self._lock:
            position = self._space.allocate(frame.payload_bytes)
            acknowledge = self._ask(frame)
        part = self._payloads.put(frame._replace(acknowledge=acknowledge), memory, block_ids, position)
        if self._message_bytes + len(part) > self._max_message_bytes:
            self.flush()
        self._message.append(part)
        self._message_bytes += len(part)
        self._message_payload_bytes += frame.payload_bytes
        if self._message_bytes >= self._max_message_bytes or self._message_payload_bytes >= self.max_payload_bytes:
            self.flush()

    def withdraw(self, reservation: int) -> None:
        self._payloads.withdraw(reservation)

    def flush(self) -> None:
        if self._message:
            self._pipe.send(self._message[0] if len(self._message) == 1 else b"".join(self._message))
            self._message.clear()
            self._message_bytes = self._message_payload_bytes = 0

    def ask(self, call: transfer_pb2.StreamCall, timeout_s: float) -> transfer_pb2.CallAnswer:
        """Sends a call and waits for its answer; before there are frames.

        Raises:
            BatonError: the receiver refuses it, or does not answer.
        """
        self.call(call, self._awaited.put)
        answer = self._await(timeout_s)
        assert isinstance(answer, transfer_pb2.CallAnswer)
        if answer.status:
            raise from_status(answer.status, answer.message)
        return answer

    def call(self, call: transfer_pb2.StreamCall, answer: Callable[[transfer_pb2.CallAnswer], None]) -> None:
        """Sends a call, after the frames that were sent before; `answer` is not called if the wire breaks."""
        self.flush()
        with self._lock:
            self._num_calls += 1
            call.id = self._num_calls
            self._calls[call.id] = answer
        self._pipe.send(CALL_MAGIC + call.SerializeToString())

    def connected(self, settings: WireSettings) -> tuple[StreamWire, StreamControl]:
        """The way can be gone: from here on `events` hears when it breaks. What `Transport.connect` is to return."""
        with self._lock:
            self._is_connected = True
            error = self._failure
        if error is not None:
            self._events.broken(error)
        return self, StreamControl(self, settings)

    def close(self) -> None:
        self._closing = True
        self._pipe.end()
        self._reader.join()
        self._pipe.close()
        self._payloads.close()

    def _has_room(self) -> bool:
        return self._space.num_pieces < MAX_FRAMES and self._space.has_room(self.max_payload_bytes)

    def _ask(self, frame: Frame) -> bool:
        """Whether to ask for an acknowledgement of a frame that has taken its room; the lock is held.

        Each reply wakes two threads here, so beside those that the link asks for there are as few as keep up the flow:
        one for each half of the room.
        """
        self._num_frames += 1
        self._unasked_bytes += frame.payload_bytes
        due = (
            frame.acknowledge
            or 2 * self._unasked_bytes >= self._space.capacity_bytes
            or 2 * (self._num_frames - self._num_asked) >= MAX_FRAMES
            or not self._has_room()
        )
        if due:
            self._num_asked = self._num_frames
            self._unasked_bytes = 0
        return due

    def _greet(self, timeout_s: float) -> None:
        """Waits for the answer to the hello."""
        try:
            reply = self._await(timeout_s)
        finally:
            self._payloads.settle()
        assert isinstance(reply, transfer_pb2.StreamReply)
        if reply.payload_error:
            raise TransportUnavailableError(f"{self._address} cannot take payloads this way: {reply.payload_error}")
        self.max_payload_bytes = min(self.max_payload_bytes, reply.max_payload_bytes)
        self._max_message_bytes = self._payloads.max_message_bytes(self.max_payload_bytes)

    def _await(self, timeout_s: float) -> transfer_pb2.StreamReply | transfer_pb2.CallAnswer:
        """The next answer; raises BatonError where none comes."""
        try:
            answer = self._awaited.get(timeout=timeout_s)
        except queue.Empty:
            raise UnavailableError(f"{self._address} did not answer within {timeout_s:g} s") from None
        if isinstance(answer, BatonError):
            raise answer
        return answer

    def _read(self) -> None:
        """Hands replies on until the stream ends; it is broken if nobody has closed it."""
        try:
            self._awaited.put(self._receive())
            while True:
                self._acknowledge(self._receive())
        except BatonError as error:
            self._awaited.put(error)
            with self._lock:
                self._failure = error
                is_told = self._is_connected and not self._closing
            if is_told:
                self._events.broken(error)

    def _receive(self) -> transfer_pb2.StreamReply:
        try:
            reply = transfer_pb2.StreamReply.FromString(self._pipe.receive())
        except DecodeError:
            raise TransferError(f"{self._address} sent a reply that is none") from None
        if reply.status:
            raise from_status(reply.status, reply.message)
        return reply

    def _acknowledge(self, reply: transfer_pb2.StreamReply) -> None:
        with self._lock:
            for _ in range(min(reply.num_frames - self._num_acknowledged, self._space.num_pieces)):
                self._space.free()
            self._num_acknowledged = reply.num_frames
            answers = [(self._calls.pop(answer.id, None), answer) for answer in reply.answers]
        for refusal in reply.refusals:
            self._events.refused(refusal.reservation, from_status(refusal.status, refusal.message))
        for call, answer in answers:
            if call is not None:
                call(answer)
        self._events.progressed()


class StreamControl:
    """Open and Commit in line with the frames; Abort beside them, for it must arrive when the stream has failed too."""

    def __init__(self, wire: StreamWire, settings: WireSettings) -> None:
        self._wire = wire
        self._settings = settings
        self._aborts: Aborts | None = None

    def open(self, request: transfer_pb2.OpenRequest, answer: Answer) -> None:
        self._wire.call(transfer_pb2.StreamCall(open=request), functools.partial(_tell, answer))

    def commit(self, request: transfer_pb2.CommitRequest, answer: Answer) -> None:
        self._wire.call(transfer_pb2.StreamCall(commit=request), functools.partial(_tell, answer))

    def abort(self, request: transfer_pb2.AbortRequest) -> None:
        if self._aborts is None:
            self._aborts = Aborts(self._settings.control_address, self._settings.timeout_s)
        self._aborts.abort(request)

    def close(self) -> None:
        if self._aborts is not None:
            self._aborts.close()


def _tell(whom: Answer, answer: transfer_pb2.CallAnswer) -> None:
    whom(from_status(answer.status, answer.message) if answer.status else None)
