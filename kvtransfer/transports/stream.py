"""The sending end of the data plane's stream, which `grpc` and `shm` share.

One bidirectional gRPC stream of raw bytes carries all frames of a link: hello first, then messages of one or more
frames; replies acknowledge them. The two transports differ in where payloads lie: behind their headers, or in a ring.

Threads: the link's thread calls; gRPC's own thread pulls `_messages`; one thread reads replies.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import ClassVar, Protocol

import grpc
from google.protobuf.message import DecodeError

from baton.errors import BatonError, TransferError, UnavailableError, from_status
from baton.internal.v1 import transfer_pb2
from kvtransfer.channel import rpc_failure, stream_options
from kvtransfer.control import GrpcControl
from kvtransfer.data_server import METHOD, max_message_bytes
from kvtransfer.frame import Frame
from kvtransfer.pages import BlockIds, PageMemory
from kvtransfer.ring import RingSpace
from kvtransfer.transports.base import Control, TransportUnavailableError, WireEvents, WireSettings


class Payloads(Protocol):
    """Where the payloads of frames lie on their way."""

    @property
    def capacity_bytes(self) -> int:
        """How much may be under way."""

    @property
    def ring_name(self) -> str:
        """The shared-memory file that payloads lie in; empty where they follow their headers."""

    def put(self, frame: Frame, memory: PageMemory, block_ids: BlockIds, position: int) -> bytes:
        """Takes the pages, to `position` of [0, capacity_bytes), and returns what goes into the message."""

    def settle(self) -> None:
        """The receiver has answered the hello, or never will."""


class StreamTransport:
    """What both stream transports have in common."""

    name: ClassVar[str]

    def control(self, offer: transfer_pb2.TransportOffer, address: str, timeout_s: float) -> Control:
        return GrpcControl(address, timeout_s)


class StreamWire:
    """One stream to a receiver's data server.

    Raises what `Transport.connect` does.
    """

    def __init__(self, address: str, settings: WireSettings, payloads: Payloads, events: WireEvents) -> None:
        self.max_payload_bytes = settings.max_payload_bytes
        self._address = address
        self._payloads = payloads
        self._events = events
        self._lock = threading.Lock()
        self._space = RingSpace(payloads.capacity_bytes)
        self._num_acknowledged = 0
        self._closing = False
        # Frames of the message that is being filled: small pages share one, and so do the headers of a ring, whose
        # messages cost more than their copies. A quarter of the ring keeps both ends busy.
        self._message: list[bytes] = []
        self._message_bytes = 0
        self._message_payload_bytes = 0
        self._full_payload_bytes = payloads.capacity_bytes // 4
        self._max_message_bytes = max_message_bytes(settings.max_payload_bytes)
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._channel = grpc.insecure_channel(address, options=stream_options(self._max_message_bytes))
        self._hello = transfer_pb2.StreamHello(
            worker=settings.worker,
            epoch=settings.epoch,
            sender=settings.origin.sender,
            sender_epoch=settings.origin.epoch,
            ring_name=payloads.ring_name,
            ring_bytes=payloads.capacity_bytes if payloads.ring_name else 0,
        )
        self._greeting: queue.SimpleQueue[transfer_pb2.StreamReply | BatonError] = queue.SimpleQueue()
        stream: grpc.StreamStreamMultiCallable[bytes, bytes] = self._channel.stream_stream(METHOD)
        self._call = stream(self._messages())
        self._reader = threading.Thread(target=self._read, name=f"kv-replies-{settings.worker}", daemon=True)
        self._reader.start()
        try:
            self._greet(settings.timeout_s)
        except BatonError:
            self.close()
            raise

    @property
    def in_flight(self) -> int:
        with self._lock:
            return self._space.num_pieces

    def has_room(self) -> bool:
        with self._lock:
            return self._space.has_room(self.max_payload_bytes)

    def send(self, frame: Frame, memory: PageMemory, block_ids: BlockIds) -> None:
        with self._lock:
            position = self._space.allocate(frame.payload_bytes)
        part = self._payloads.put(frame, memory, block_ids, position)
        if self._message_bytes + len(part) > self._max_message_bytes:
            self.flush()
        self._message.append(part)
        self._message_bytes += len(part)
        self._message_payload_bytes += frame.payload_bytes
        if self._message_bytes >= self.max_payload_bytes or self._message_payload_bytes >= self._full_payload_bytes:
            self.flush()

    def flush(self) -> None:
        if self._message:
            self._outbox.put(b"".join(self._message))
            self._message.clear()
            self._message_bytes = self._message_payload_bytes = 0

    def close(self) -> None:
        self._closing = True
        self._outbox.put(None)
        self._call.cancel()
        self._reader.join()
        self._channel.close()

    def _greet(self, timeout_s: float) -> None:
        """Waits for the answer to the hello."""
        try:
            reply = self._greeting.get(timeout=timeout_s)
        except queue.Empty:
            raise UnavailableError(f"{self._address} did not answer within {timeout_s:g} s") from None
        finally:
            self._payloads.settle()
        if isinstance(reply, BatonError):
            raise reply
        if reply.ring_error:
            raise TransportUnavailableError(f"{self._address} cannot map the ring: {reply.ring_error}")
        self.max_payload_bytes = min(self.max_payload_bytes, reply.max_payload_bytes)
        self._max_message_bytes = max_message_bytes(self.max_payload_bytes)

    def _messages(self) -> Iterator[bytes]:
        """What goes out; pulled by a thread of gRPC's."""
        yield self._hello.SerializeToString()
        yield from iter(self._outbox.get, None)

    def _read(self) -> None:
        """Hands replies on until the stream ends; it is broken if nobody has closed it."""
        error: BatonError = UnavailableError(f"{self._address} ended the stream")
        try:
            self._greeting.put(transfer_pb2.StreamReply.FromString(next(self._call)))
            for message in self._call:
                self._acknowledge(transfer_pb2.StreamReply.FromString(message))
        except StopIteration:
            pass
        except grpc.RpcError:
            error = rpc_failure(self._address, self._call)
        except DecodeError:
            error = TransferError(f"{self._address} sent a reply that is none")
        self._greeting.put(error)
        if not self._closing:
            self._events.broken(error)

    def _acknowledge(self, reply: transfer_pb2.StreamReply) -> None:
        with self._lock:
            for _ in range(min(reply.num_frames - self._num_acknowledged, self._space.num_pieces)):
                self._space.free()
            self._num_acknowledged = reply.num_frames
        for refusal in reply.refusals:
            self._events.refused(refusal.reservation, from_status(refusal.status, refusal.message))
        self._events.progressed()
