"""The receiver's end of one sender's stream of frames, whatever carries its messages.

The first message is a hello, each other one holds whole frames or a call. A frame that is refused is told in a reply
and harms no other; what is no frame ends the stream.
"""

from __future__ import annotations

import queue
from typing import TYPE_CHECKING

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
        if (wanted.worker, wanted.epoch) != (receiver.worker, receiver.epoch):
            raise StaleAttemptError(
                f"this is {receiver.worker} in epoch {receiver.epoch}, not {wanted.worker} in epoch {wanted.epoch}"
            )
        self._receiver = receiver
        self._origin = Origin(wanted.sender, wanted.sender_epoch)
        self._source: Source = InlineSource()
        self._num_frames = 0
        self._reply = transfer_pb2.StreamReply(max_payload_bytes=receiver.max_payload_bytes)
        # Whether the sender waits for a reply.
        self.owes_reply = True
        try:
            self._source = open_source(wanted, host, receiver.max_payload_bytes, receiver.timeout_s)
        except (OSError, ValueError) as error:
            self._reply.payload_error = str(error)

    def take(self, message: bytes) -> None:
        """Writes the frames of a message, or does what it calls for; raises TransferError where it is neither."""
        if message.startswith(CALL_MAGIC):
            self._call(message)
            return
        offset = 0
        while offset < len(message):
            frame = Frame.unpack(message, offset)
            payload, offset = self._source.payload(frame, message, offset + HEADER_BYTES)
            refusal = self._receiver.write(frame, payload, self._origin, self._source.transport)
            if refusal is not None:
                self._reply.refusals.add(reservation=frame.reservation, status=refusal.status, message=refusal.message)
            self._num_frames += 1
            self.owes_reply |= frame.acknowledge or refusal is not None

    def reply(self) -> bytes:
        """Acknowledges what was taken; the first one answers the hello."""
        reply, self._reply = self._reply, transfer_pb2.StreamReply()
        self.owes_reply = False
        reply.num_frames = self._num_frames
        return reply.SerializeToString()

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
                self._commit(call.commit)
            elif call.HasField("store"):
                answer.value = self._source.store(call.store)
            else:
                self._receiver.open(call.open)
        except BatonError as error:
            answer.status, answer.message = error.status, error.message

    def _commit(self, request: transfer_pb2.CommitRequest) -> None:
        outcome: queue.SimpleQueue[BatonError | None] = queue.SimpleQueue()
        self._receiver.commit(request, outcome.put)
        # All frames came before: what is missing will not come. To a committed reservation this does nothing.
        self._receiver.abort(
            transfer_pb2.AbortRequest(ref=request.ref, reservation=request.reservation, reason="frames are missing")
        )
        if (error := outcome.get()) is not None:
            raise error


def failure(error: BatonError) -> bytes:
    """The last reply of a stream that ends because of `error`, where the stream itself cannot carry a status."""
    return transfer_pb2.StreamReply(status=error.status, message=error.message).SerializeToString()
