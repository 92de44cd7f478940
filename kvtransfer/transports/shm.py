"""Payloads in a shared-memory ring of the sender, headers over a Unix socket. For two processes of one host."""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import TYPE_CHECKING, ClassVar

from baton.errors import UnavailableError
from baton.internal.v1 import transfer_pb2
from kvtransfer.frame import Frame
from kvtransfer.pages import BlockIds, PageMemory
from kvtransfer.ring import create_ring, shm_domain, sweep_rings, unlink_ring
from kvtransfer.socket_server import MAX_MESSAGE_BYTES, SocketServer, abstract, is_same_user
from kvtransfer.sources import OFFSET
from kvtransfer.transports.base import Control, TransportUnavailableError, Wire, WireEvents, WireSettings
from kvtransfer.transports.stream import StreamWire

if TYPE_CHECKING:
    from kvtransfer.receiver import Receiver

# `struct timeval`.
_TIME = struct.Struct("@ll")


class ShmTransport:
    name: ClassVar[str] = "shm"

    def carries(self, memory: PageMemory) -> bool:
        return True

    def listen(self, receiver: Receiver, host: str) -> SocketListener:
        return SocketListener(receiver, self.name)

    def reaches(self, offer: transfer_pb2.TransportOffer) -> bool:
        return is_on_this_host(offer)

    def connect(
        self, offer: transfer_pb2.TransportOffer, settings: WireSettings, events: WireEvents
    ) -> tuple[Wire, Control]:
        sweep_rings()
        pipe = SocketPipe(offer.address, settings.timeout_s)
        try:
            payloads = RingPayloads(settings.window_bytes)
        except OSError as error:
            pipe.close()
            raise TransportUnavailableError(
                f"no shared memory for a ring of {settings.window_bytes} bytes: {error}"
            ) from error
        return StreamWire(pipe, offer.address, settings, payloads, events).connected(settings)


class SocketListener:
    """Of a transport whose headers take a Unix socket, and that shares memory in a ring's file.

    Raises:
        TransportUnavailableError: there are no such sockets.
    """

    def __init__(self, receiver: Receiver, transport: str) -> None:
        sweep_rings()
        try:
            self._server = SocketServer(receiver)
        except OSError as error:
            raise TransportUnavailableError(f"no abstract Unix sockets: {error}") from error
        self.offer = transfer_pb2.TransportOffer(transport=transport, address=self._server.address, domain=shm_domain())

    def close(self) -> None:
        self._server.close()


def is_on_this_host(offer: transfer_pb2.TransportOffer) -> bool:
    """Whether this process sees the shared memory of a `SocketListener`'s."""
    return offer.domain != "" and offer.domain == shm_domain()


class SocketPipe:
    """A connection to a `SocketServer`.

    Raises:
        UnavailableError: nobody listens there any more.
        TransportUnavailableError: the socket is another user's.
    """

    def __init__(self, address: str, timeout_s: float) -> None:
        self._address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.connect(abstract(address))
        except OSError as error:
            self._socket.close()
            raise UnavailableError(f"{address} cannot be reached: {error}") from error
        if not is_same_user(self._socket):
            self._socket.close()
            raise TransportUnavailableError(f"{address} is another user's")
        self._socket.settimeout(None)
        # Of sending alone.
        whole_s, rest_s = divmod(timeout_s, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIME.pack(int(whole_s), int(rest_s * 1e6)))

    def send(self, message: bytes) -> None:
        # Frames that name many pages fill the socket before there are too many. What fails here ends what is received
        # as well.
        try:
            self._socket.send(message, socket.MSG_NOSIGNAL)
        except OSError:
            self.end()

    def receive(self) -> bytes:
        try:
            message = self._socket.recv(MAX_MESSAGE_BYTES)
        except OSError as error:
            raise UnavailableError(f"{self._address} cannot be reached: {error}") from None
        if not message:
            raise UnavailableError(f"{self._address} ended the stream")
        return message

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


class RingPayloads:
    """Raises OSError where there is no room for the ring."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._ring_name, self._ring = create_ring(capacity_bytes)

    def max_message_bytes(self, max_payload_bytes: int) -> int:
        # A message takes microseconds, and the receiver writes one frame while the next is read.
        return 0

    def put(self, frame: Frame, memory: PageMemory, block_ids: BlockIds, position: int) -> bytes:
        payload = self._ring.view(position, frame.payload_bytes)
        checksum = memory.copy_out(frame.slot, block_ids, frame.heads, payload)
        return frame._replace(checksum=checksum).pack() + OFFSET.pack(position)

    def announce(self, hello: transfer_pb2.StreamHello) -> None:
        hello.ring_name, hello.ring_bytes = self._ring_name, self.capacity_bytes

    def settle(self) -> None:
        unlink_ring(self._ring_name)

    def withdraw(self, reservation: int) -> None:
        """They are copies."""

    def close(self) -> None:
        """The mapping goes with this."""
