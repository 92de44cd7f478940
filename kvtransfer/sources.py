"""Where a receiver finds the payloads of one stream's frames: the other end of a sender's `Payloads`."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from baton.errors import TransferError
from baton.internal.v1 import transfer_pb2
from kvtransfer.arrival import Carrier, HostCarrier, Payload
from kvtransfer.frame import Frame
from kvtransfer.pages import Bytes
from kvtransfer.ring import Ring, open_ring

if TYPE_CHECKING:
    from kvtransfer.receiver import Receiver

# Behind the header of a frame whose payload lies in a ring: the payload's offset there.
OFFSET = struct.Struct("<Q")


class Source(Carrier[Payload], Protocol[Payload]):
    """Used by the stream's thread alone.

    Attributes:
        max_payload_bytes: largest payload that it takes.
        in_place: whether payloads stay where they are until they are copied in; else each does until the next call.
    """

    max_payload_bytes: int
    in_place: bool

    def payload(self, frame: Frame, message: bytes, offset: int) -> tuple[Payload, int]:
        """The payload of a frame whose header ends at `offset` of its message, and where the next frame begins.

        Raises TransferError where it is none, UnavailableError where it does not come.
        """

    def store(self, call: transfer_pb2.StoreCall) -> bytes:
        """Sets a key of the group's store, or waits for it; returns the value. Raises TransferError without a group."""

    def interrupt(self) -> None:
        """Whoever waits for the sender waits no longer. Any thread may call."""

    def close(self) -> None:
        """The stream has ended. Idempotent."""


class Storeless:
    """A source without a group."""

    def store(self, call: transfer_pb2.StoreCall) -> bytes:
        raise TransferError("this stream has no group")

    def interrupt(self) -> None:
        """Nothing is waited for."""

    def close(self) -> None:
        """What is held goes with this."""


class InlineSource(Storeless, HostCarrier):
    """Behind their headers."""

    in_place = False

    def __init__(self, max_payload_bytes: int) -> None:
        super().__init__("grpc")
        self.max_payload_bytes = max_payload_bytes

    def payload(self, frame: Frame, message: bytes, offset: int) -> tuple[Bytes, int]:
        end = end_of(frame, message, offset, frame.payload_bytes)
        return np.frombuffer(message, dtype=np.uint8, count=frame.payload_bytes, offset=offset), end


class RingSource(Storeless, HostCarrier):
    """In shared memory."""

    in_place = False

    def __init__(self, ring: Ring, max_payload_bytes: int) -> None:
        super().__init__("shm")
        self.max_payload_bytes = max_payload_bytes
        self._ring = ring

    def payload(self, frame: Frame, message: bytes, offset: int) -> tuple[Bytes, int]:
        end = end_of(frame, message, offset, OFFSET.size)
        (position,) = OFFSET.unpack_from(message, offset)
        return self._ring.view(position, frame.payload_bytes), end


def open_source(hello: transfer_pb2.StreamHello, host: str | None, receiver: Receiver) -> Source[Any]:
    """The source that a hello asks for.

    Args:
        host: address for groups; None where the stream can have none.

    Raises:
        OSError, ValueError: it cannot be had; the message says why.
    """
    if hello.HasField("pool"):
        from kvtransfer.pool_source import PoolSource

        return PoolSource(hello, receiver.memory)
    if hello.ring_name:
        return RingSource(open_ring(hello.ring_name, hello.ring_bytes), receiver.max_payload_bytes)
    if not hello.group:
        return InlineSource(receiver.max_payload_bytes)
    if host is None:
        raise ValueError("no group goes with this stream")
    # A torch without its distributed part does all else.
    from kvtransfer.group_source import GroupSource

    return GroupSource(receiver, host, hello.group_device)


def end_of(frame: Frame, message: bytes, offset: int, num_bytes: int) -> int:
    """Where the `num_bytes` that follow a header end."""
    if offset + num_bytes > len(message):
        raise TransferError(f"frame {frame.seq} is cut off: {len(message) - offset} bytes follow its header")
    return offset + num_bytes
