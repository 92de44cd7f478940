"""Messages between two processes of one host: a protobuf message, and arrays that lie behind it as they are.

A step's arrays are a few kilobytes, for a long context of many sequences megabytes; no copy is made of them on the way
but the kernel's.
"""

from __future__ import annotations

import contextlib
import math
import socket
import struct
import threading
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
from google.protobuf.message import Message

Array = npt.NDArray[Any]
M = TypeVar("M", bound=Message)

# Bytes of the message, number of arrays, bytes of both.
_HEADER = struct.Struct("<IIQ")
# Bytes of an element, number of dimensions, and up to two lengths.
_ARRAY = struct.Struct("<IIQQ")
_DTYPES = {dtype.itemsize: dtype for dtype in map(np.dtype, (np.int64, np.int32))}
_ALIGNMENT = 8
_PADDING = bytes(_ALIGNMENT)
# Of most messages; larger ones wait for the other end to read.
_BUFFER_BYTES = 1 << 20


class Channel(Generic[M]):
    """One end. Any thread may send, one receives.

    Args:
        kind: what messages come in; those that go out may be of another kind.
    """

    def __init__(self, connection: socket.socket, kind: type[M]) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        self._socket = connection
        self._kind = kind
        self._lock = threading.Lock()

    def send(self, message: Message, arrays: Sequence[Array] = ()) -> None:
        """Sends a message, and arrays of int64 or int32 with one or two dimensions.

        Raises:
            OSError: the other end is gone.
        """
        body = message.SerializeToString()
        described = b"".join(_describe(array) for array in arrays)
        buffers: list[Any] = [b"", described, body, _padding(len(body))]
        for array in arrays:
            # Only a flat one may be empty.
            buffers += [np.ascontiguousarray(array).reshape(-1).data.cast("B"), _padding(array.nbytes)]
        buffers[0] = _HEADER.pack(len(body), len(arrays), sum(map(len, buffers)))
        with self._lock:
            self._send_all([buffer for buffer in buffers if len(buffer)])

    def receive(self) -> tuple[M, list[Array]]:
        """The next message and its arrays; waits for it.

        Raises:
            EOFError: the other end is gone.
        """
        num_body, num_arrays, num_bytes = _HEADER.unpack(self._receive_exactly(_HEADER.size))
        received = memoryview(self._receive_exactly(num_bytes))
        offset = _ARRAY.size * num_arrays
        message = self._kind.FromString(bytes(received[offset : offset + num_body]))
        offset += num_body + len(_padding(num_body))
        arrays = []
        for index in range(num_arrays):
            item_bytes, num_dimensions, *shape = _ARRAY.unpack_from(received, _ARRAY.size * index)
            count = math.prod(shape)
            array = np.frombuffer(received, _DTYPES[item_bytes], count, offset).reshape(shape[:num_dimensions])
            offset += array.nbytes + len(_padding(array.nbytes))
            arrays.append(array)
        return message, arrays

    def close(self) -> None:
        """Hangs up; whoever receives at either end gets an EOFError. Idempotent."""
        # The other end may have been first.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _send_all(self, buffers: list[Any]) -> None:
        """Sends buffers one behind the other; the lock is held."""
        while buffers:
            sent = self._socket.sendmsg(buffers)
            while buffers and sent >= len(buffers[0]):
                sent -= len(buffers.pop(0))
            if sent:
                buffers[0] = memoryview(buffers[0])[sent:]

    def _receive_exactly(self, num_bytes: int) -> bytearray:
        received = bytearray(num_bytes)
        rest = memoryview(received)
        while rest:
            try:
                count = self._socket.recv_into(rest, 0, socket.MSG_WAITALL)
            except OSError as error:
                raise EOFError(f"the other end is gone: {error}") from error
            if not count:
                raise EOFError("the other end is gone")
            rest = rest[count:]
        return received


def _describe(array: Array) -> bytes:
    return _ARRAY.pack(array.itemsize, array.ndim, *array.shape, *(1,) * (2 - array.ndim))


def _padding(num_bytes: int) -> bytes:
    """What lies behind so many bytes, for the next array to be aligned."""
    return _PADDING[: -num_bytes % _ALIGNMENT]
