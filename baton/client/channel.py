"""What both clients know of gRPC beside the calls: channel options, and the seam where its errors become Baton's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import grpc

from baton.errors import from_status

MAX_MESSAGE_BYTES = 64 << 20


def channel_options(max_message_bytes: int) -> list[tuple[str, int]]:
    """Limits the size of messages both ways."""
    return [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
    ]


@contextlib.contextmanager
def baton_errors() -> Iterator[None]:
    """Raises what a server answered, or what the channel failed with, as one of `baton.errors`."""
    try:
        yield
    except grpc.RpcError as error:
        status, details = error.code(), error.details()
        raise from_status(status.name, details or status.name) from error
