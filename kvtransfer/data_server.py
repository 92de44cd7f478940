"""The receiver's data plane: a synchronous gRPC server for streams of frames.

Synchronous, since each stream has a thread that spends its time copying; asyncio reaches a third of its throughput.
Messages are raw bytes. A frame that is refused is told in a reply and harms no other; what is no frame ends the stream.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from concurrent import futures
from typing import TYPE_CHECKING, NoReturn

import grpc
import numpy as np
from google.protobuf.message import DecodeError

from baton.errors import BatonError, StaleAttemptError, TransferError
from baton.internal.v1 import transfer_pb2
from kvtransfer.channel import stream_options
from kvtransfer.frame import HEADER_BYTES, Frame
from kvtransfer.pages import Bytes
from kvtransfer.reservation import Origin
from kvtransfer.ring import Ring, open_ring

if TYPE_CHECKING:
    from kvtransfer.receiver import Receiver

_SERVICE, _NAME = "baton.internal.v1.KVData", "Stream"
METHOD = f"/{_SERVICE}/{_NAME}"
# Behind the header of a frame whose payload lies in a ring: the payload's offset there.
OFFSET = struct.Struct("<Q")
# Each sender has one stream and each stream a thread. More are refused rather than left waiting.
_MAX_STREAMS = 256
# Headers, and whatever else is not payload, in one message.
_SLACK_BYTES = 64 << 10


def max_message_bytes(max_payload_bytes: int) -> int:
    """Size limit of one message of the stream."""
    return max_payload_bytes + _SLACK_BYTES


class DataServer:
    """Serves one receiver on a free port.

    Attributes:
        address: host:port.
    """

    def __init__(self, receiver: Receiver, host: str, max_payload_bytes: int) -> None:
        self._receiver = receiver
        self._max_payload_bytes = max_payload_bytes
        self._threads = futures.ThreadPoolExecutor(_MAX_STREAMS, thread_name_prefix="kv-data")
        self._server = grpc.server(
            self._threads,
            options=(*stream_options(max_message_bytes(max_payload_bytes)), ("grpc.so_reuseport", 0)),
            maximum_concurrent_rpcs=_MAX_STREAMS,
        )
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(self._serve)
        self._server.add_registered_method_handlers(_SERVICE, {_NAME: handler})
        self.address = f"{host}:{self._server.add_insecure_port(f'{host}:0')}"
        self._server.start()

    def close(self) -> None:
        """Ends all streams and their threads. Idempotent."""
        self._server.stop(grace=None).wait()
        self._threads.shutdown()

    def _serve(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            hello = transfer_pb2.StreamHello.FromString(next(messages))
            self._check(hello)
        except (StopIteration, DecodeError):
            _refuse(context, TransferError("the stream does not begin with a hello"))
        except BatonError as error:
            _refuse(context, error)
        ring, ring_error = None, ""
        if hello.ring_name:
            try:
                ring = open_ring(hello.ring_name, hello.ring_bytes)
            except (OSError, ValueError) as error:
                ring_error = str(error)
        greeting = transfer_pb2.StreamReply(max_payload_bytes=self._max_payload_bytes, ring_error=ring_error)
        yield greeting.SerializeToString()
        stream = _Stream(self._receiver, Origin(hello.sender, hello.sender_epoch), ring)
        try:
            for message in messages:
                yield stream.write(message).SerializeToString()
        except TransferError as error:
            _refuse(context, error)

    def _check(self, hello: transfer_pb2.StreamHello) -> None:
        receiver = self._receiver
        if (hello.worker, hello.epoch) != (receiver.worker, receiver.epoch):
            raise StaleAttemptError(
                f"this is {receiver.worker} in epoch {receiver.epoch}, not {hello.worker} in epoch {hello.epoch}"
            )


class _Stream:
    """One sender's frames."""

    def __init__(self, receiver: Receiver, origin: Origin, ring: Ring | None) -> None:
        self._receiver = receiver
        self._origin = origin
        self._ring = ring
        self._transport = "grpc" if ring is None else "shm"
        self._num_frames = 0

    def write(self, message: bytes) -> transfer_pb2.StreamReply:
        """Writes the frames of a message; raises TransferError where it is cut off or no frame."""
        reply = transfer_pb2.StreamReply()
        offset = 0
        while offset < len(message):
            frame = Frame.unpack(message, offset)
            payload, offset = self._payload(frame, message, offset + HEADER_BYTES)
            refusal = self._receiver.write(frame, payload, self._origin, self._transport)
            if refusal is not None:
                reply.refusals.add(reservation=frame.reservation, status=refusal.status, message=refusal.message)
            self._num_frames += 1
        reply.num_frames = self._num_frames
        return reply

    def _payload(self, frame: Frame, message: bytes, offset: int) -> tuple[Bytes, int]:
        """The payload of a frame whose header ends at `offset`, and where the next frame begins."""
        end = offset + (frame.payload_bytes if self._ring is None else OFFSET.size)
        if end > len(message):
            raise TransferError(f"frame {frame.seq} is cut off: {len(message) - offset} bytes follow its header")
        if self._ring is None:
            return np.frombuffer(message, dtype=np.uint8, count=frame.payload_bytes, offset=offset), end
        (position,) = OFFSET.unpack_from(message, offset)
        return self._ring.view(position, frame.payload_bytes), end


def _refuse(context: grpc.ServicerContext, error: BatonError) -> NoReturn:
    context.abort(grpc.StatusCode[error.status], error.message)
