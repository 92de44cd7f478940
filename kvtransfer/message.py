"""Bytes objects that are filled in place: gRPC takes nothing else, and a join would be a copy more."""

from __future__ import annotations

import ctypes

import numpy as np

from kvtransfer.pages import Bytes

_new_bytes = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.argtypes = [ctypes.c_char_p, ctypes.c_ssize_t]
_new_bytes.restype = ctypes.py_object
# CPython ends every bytes object with a zero, which is part of the size of an empty one.
_HEADER_BYTES = bytes.__basicsize__ - 1


def new_message(num_bytes: int) -> tuple[bytes, Bytes]:
    """A message and its content, uint8 [num_bytes], undefined as yet.

    As in C, the content may be written until somebody else sees the message; it lives as long as that.
    """
    message: bytes = _new_bytes(None, num_bytes)
    content = (ctypes.c_uint8 * num_bytes).from_address(id(message) + _HEADER_BYTES)
    return message, np.frombuffer(memoryview(content), dtype=np.uint8)
