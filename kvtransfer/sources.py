"""Where a receiver finds the payloads of one stream's frames: the other end of a sender's `Payloads`."""

from __future__ import annotations

import struct
from typing import Protocol

import numpy as np

from baton.errors import TransferError
from baton.internal.v1 import transfer_pb2
from kvtransfer.frame import Frame
from kvtransfer.pages import Bytes
from kvtransfer.ring import Ring, open_ring

# Behind the header of a frame whose payload lies in a ring: the payload's offset there.
OFFSET = struct.Struct("<Q")


class Source(Protocol):
    """Used by the stream's thread alone.

    Attributes:
        transport: that the frames count for.
    """

    transport: str

    def payload(self, frame: Frame, message: bytes, offset: int) -> tuple[Bytes, int]:
        """The payload of a frame whose header ends at `offset` of its message, and where the next frame begins.

        The payload stays until the next call. Raises TransferError where it is none, UnavailableError where it does
        not come.
        """

    def store(self, call: transfer_pb2.StoreCall) -> bytes:
        """Sets a key of the group's store, or waits for it; returns the value. Raises TransferError without a group."""

    def close(self) -> None:
        """The stream has ended. Idempotent."""


class _Storeless:
    def store(self, call: transfer_pb2.StoreCall) -> bytes:
        raise TransferError("this stream has no group")

    def close(self) -> None:
        """What is held goes with this."""


class InlineSource(_Storeless):
    """Behind their headers."""

    transport = "grpc"

    def payload(self, frame: Frame, message: bytes, offset: int) -> tuple[Bytes, int]:
        end = _end(frame, message, offset, frame.payload_bytes)
        return np.frombuffer(message, dtype=np.uint8, count=frame.payload_bytes, offset=offset), end


class RingSource(_Storeless):
    """In shared memory."""

    transport = "shm"

    def __init__(self, ring: Ring) -> None:
        self._ring = ring

    def payload(self, frame: Frame, message: bytes, offset: int) -> tuple[Bytes, int]:
        end = _end(frame, message, offset, OFFSET.size)
        (position,) = OFFSET.unpack_from(message, offset)
        return self._ring.view(position, frame.payload_bytes), end


def open_source(hello: transfer_pb2.StreamHello, host: str | None, max_payload_bytes: int, timeout_s: float) -> Source:
    """The source that a hello asks for.

    Args:
        host: address for groups; None where the stream can have none.

    Raises:
        OSError, ValueError: it cannot be had; the message says why.
    """
    if hello.ring_name:
        return RingSource(open_ring(hello.ring_name, hello.ring_bytes))
    if not hello.group:
        return InlineSource()
    if host is None:
        raise ValueError("no group goes with this stream")
    # A torch without its distributed part does all else.
    from kvtransfer.group_source import GroupSource

    return GroupSource(host, max_payload_bytes, timeout_s)


def _end(frame: Frame, message: bytes, offset: int, num_bytes: int) -> int:
    """Where the `num_bytes` that follow a header end."""
    if offset + num_bytes > len(message):
        raise TransferError(f"frame {frame.seq} is cut off: {len(message) - offset} bytes follow its header")
    return offset + num_bytes
