"""The receiver's end of one sender's stream of frames, whatever carries its messages.

The first message is a hello, each other one holds whole frames or a call. A frame that is refused is told in a reply
and harms no other; what is no frame ends the stream.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError

from baton.errors import BatonError, StaleAttemptError, TransferError
from baton.internal.v1 import transfer_pb2
from kvtransfer.frame import HEADER_BYTES, Frame
from kvtransfer.reservation import Origin
from kvtransfer.sources import InlineSource, Source, open_source

if TYPE_CHECKING:
    from kvtransfer.receiver import Receiver

# What a StreamCall begins with, in place of a frame's magic.
CALL_MAGIC = b"BKVC"


class Session:
    """Called by one thread.

    Args:
        host: address at which the sender may make a group with this process; None for a stream that has none.

    Raises:
        TransferError: `hello` is none.
        StaleAttemptError: it means another receiver.
    """

    def __init__(self, receiver: Receiver, hello: bytes, *, host: str | None = None) -> None:
        try:
            wanted = transfer_pb2.StreamHello.FromString(hello)
        except DecodeError:
            raise TransferError("the stream does not begin with a hello") from None
        if (wanted.worker, wanted.epoch, wanted.rank) != (receiver.worker, receiver.epoch, receiver.rank):
            raise StaleAttemptError(
                f"this is {receiver.worker} in epoch {receiver.epoch}, rank {receiver.rank}, "
                f"not {wanted.worker} in epoch {wanted.epoch}, rank {wanted.rank}"
            )
        self._receiver = receiver
        self._origin = Origin(wanted.sender, wanted.sender_epoch, wanted.sender_rank)
        self._source: Source[Any] = InlineSource(receiver.max_payload_bytes)
        # Frames that were taken and are not written, and how many are.
        self._arrived: list[tuple[Frame, Any]] = []
        self._num_frames = 0
        self._reply = transfer_pb2.StreamReply()
        # Whether the sender waits for a reply.
        self.owes_reply = True
        try:
            self._source = open_source(wanted, host, receiver)
            self._reply.max_payload_bytes = self._source.max_payload_bytes
        except (OSError, ValueError) as error:
            self._reply.payload_error = str(error)

    def take(self, message: bytes) -> None:
        """Takes the frames of a message, or does what it calls for; raises TransferError where it is neither.

        Frames are written at once, unless it `gathers` them: then by `write`, `reply` and before the next call.
        """
        if message.startswith(CALL_MAGIC):
            self.write()
            self._call(message)
            return
        offset = 0
        while offset < len(message):
            frame = Frame.unpack(message, offset)
            payload, offset = self._source.payload(frame, message, offset + HEADER_BYTES)
            self._arrived.append((frame, payload))
            self.owes_reply |= frame.acknowledge
            if not self._source.in_place:
                self.write()

    @property
    def gathers(self) -> bool:
        """Whether what has come together is best written together."""
        return self._source.in_place

    def write(self) -> None:
        """Writes all that was taken."""
        if not self._arrived:
            return
        refusals = self._receiver.write(self._arrived, self._origin, self._source)
        for (frame, _), refusal in zip(self._arrived, refusals, strict=True):
            if refusal is not None:
                self._reply.refusals.add(reservation=frame.reservation, status=refusal.status, message=refusal.message)
                self.owes_reply = True
        self._num_frames += len(self._arrived)
        self._arrived.clear()

    def reply(self) -> bytes:
        """Acknowledges what was taken; the first one answers the hello."""
        self.write()
        reply, self._reply = self._reply, transfer_pb2.StreamReply()
        self.owes_reply = False
        reply.num_frames = self._num_frames
        return reply.SerializeToString()

    def interrupt(self) -> None:
        """The stream is to end: its thread waits no longer for what the sender may never do. Any thread may call."""
        self._source.interrupt()

    def close(self) -> None:
        """The stream has ended. Idempotent."""
        self._source.close()

    def _call(self, message: bytes) -> None:
        try:
            call = transfer_pb2.StreamCall.FromString(message[len(CALL_MAGIC) :])
        except DecodeError:
            raise TransferError("a call is none") from None
        self.owes_reply = True
        answer = self._reply.answers.add(id=call.id)
        try:
            if call.HasField("commit"):
                self._receiver.commit(call.commit, self._origin)
            elif call.HasField("store"):
                answer.value = self._source.store(call.store)
            else:
                self._receiver.open(call.open, self._origin)
        except BatonError as error:
            answer.status, answer.message = error.status, error.message


def failure(error: BatonError) -> bytes:
    """The last reply of a stream that ends because of `error`, where the stream itself cannot carry a status."""
    return transfer_pb2.StreamReply(status=error.status, message=error.message).SerializeToString()
