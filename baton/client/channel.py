"""What both clients know of gRPC beside the calls: the channel and its credentials, and the seam where its errors
become Baton's."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator

import grpc

from baton.errors import BatonError, InvalidRequestError, from_status

MAX_MESSAGE_BYTES = 64 << 20

Metadata = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """An encrypted connection, and whom it trusts. The files are PEM.

    Attributes:
        ca_file: the authorities, one of which must have signed the router's certificate; None trusts those that gRPC
            brings.
        cert_file, key_file: this client's certificate and its key, where the router asks for one.
        server_name: the name that the router's certificate must have; None takes the target's host.
    """

    ca_file: str | os.PathLike[str] | None = None
    cert_file: str | os.PathLike[str] | None = None
    key_file: str | os.PathLike[str] | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file: one is given without the other")

    def credentials(self) -> grpc.ChannelCredentials:
        """OSError where a file cannot be read."""
        ca, key, cert = (
            None if file is None else pathlib.Path(file).read_bytes()
            for file in (self.ca_file, self.key_file, self.cert_file)
        )
        return grpc.ssl_channel_credentials(ca, key, cert)


def channel_options(max_message_bytes: int, tls: Tls | None = None) -> list[tuple[str, int | str]]:
    """Limits the size of messages both ways."""
    options: list[tuple[str, int | str]] = [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
    ]
    if tls is not None and tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return options


def call_metadata(api_key: str | None) -> Metadata:
    """The metadata of every call; InvalidRequestError where the key cannot be in a header."""
    if api_key is None:
        return ()
    if not api_key or not all("!" <= character <= "~" for character in api_key):
        raise InvalidRequestError("api_key", "must have at least one character, all of them visible ASCII")
    return (("authorization", f"Bearer {api_key}"),)


@contextlib.contextmanager
def baton_errors() -> Iterator[None]:
    """Raises what a server answered, or what the channel failed with, as one of `baton.errors`."""
    try:
        yield
    except grpc.RpcError as error:
        status, details = error.code(), error.details()
        raise _error_of(status.name, details or status.name) from error


def _error_of(status: str, details: str) -> BatonError:
    # gRPC has one status for a queue that is full and for a message that will never be taken.
    if status == "RESOURCE_EXHAUSTED" and "message larger than max" in details:
        return InvalidRequestError("message", details)
    return from_status(status, details)
