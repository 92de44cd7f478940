"""Options of the gRPC channels between senders and receivers, and what their failures mean."""

from __future__ import annotations

from collections.abc import Sequence

import grpc

from baton.errors import BatonError, UnavailableError, from_status

ChannelOptions = Sequence[tuple[str, int]]

# Statuses that gRPC itself gives for a peer that is gone or stuck; they are never an answer of the data plane.
_PEER_FAILURES = frozenset({"UNAVAILABLE", "CANCELLED", "UNKNOWN", "UNIMPLEMENTED"})
_KEEPALIVE_MS = 10_000


def channel_options(max_message_bytes: int) -> ChannelOptions:
    """Size limits both ways, for a client or a server."""
    return (
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        # A worker that comes back on its old port must not inherit a connection, nor its backoff, of its predecessor.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
    )


def stream_options(max_message_bytes: int) -> ChannelOptions:
    """Those of the data plane, whose streams live long: pings find a peer whose machine has vanished.

    Not for control: its server is the worker's, which takes such pings for abuse; there every call has a deadline.
    """
    return (
        *channel_options(max_message_bytes),
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", _KEEPALIVE_MS // 2),
    )


def rpc_failure(peer: str, call: grpc.Call) -> BatonError:
    """What a failed call to `peer`, which has ended, means for a transfer."""
    status, details = call.code().name, call.details() or ""
    if status in _PEER_FAILURES:
        return UnavailableError(f"{peer} cannot be reached: {details}")
    return from_status(status, details)
