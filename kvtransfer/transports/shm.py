"""Payloads in a shared-memory ring of the sender, headers over a Unix socket. For two processes of one host."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING, ClassVar

from baton.errors import UnavailableError
from baton.internal.v1 import transfer_pb2
from kvtransfer.frame import Frame
from kvtransfer.pages import BlockIds, PageMemory
from kvtransfer.ring import create_ring, shm_domain, sweep_rings, unlink_ring
from kvtransfer.socket_server import MAX_MESSAGE_BYTES, SocketServer, abstract, is_same_user
from kvtransfer.sources import OFFSET
from kvtransfer.transports.base import Control, TransportUnavailableError, Wire, WireEvents, WireSettings
from kvtransfer.transports.stream import StreamControl, StreamWire

if TYPE_CHECKING:
    from kvtransfer.receiver import Receiver

# Joined once: an operation on flags of the enum takes as long as the call.
_SEND_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


class ShmTransport:
    name: ClassVar[str] = "shm"

    def listen(self, receiver: Receiver, host: str) -> ShmListener:
        sweep_rings()
        try:
            return ShmListener(receiver)
        except OSError as error:
            raise TransportUnavailableError(f"no abstract Unix sockets: {error}") from error

    def reaches(self, offer: transfer_pb2.TransportOffer) -> bool:
        return offer.domain != "" and offer.domain == shm_domain()

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
        wire = StreamWire(pipe, offer.address, settings, payloads, events)
        return wire, StreamControl(wire, settings)


class ShmListener:
    """Raises OSError where there are no such sockets."""

    def __init__(self, receiver: Receiver) -> None:
        self._server = SocketServer(receiver)
        self.offer = transfer_pb2.TransportOffer(
            transport=ShmTransport.name, address=self._server.address, domain=shm_domain()
        )

    def close(self) -> None:
        self._server.close()


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

    def send(self, message: bytes) -> None:
        # Frames are few enough to find room. What fails here ends what is received as well.
        try:
            self._socket.send(message, _SEND_FLAGS)
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

    in_group = False

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.ring_name, self._ring = create_ring(capacity_bytes)

    def max_message_bytes(self, max_payload_bytes: int) -> int:
        # A message takes microseconds, and the receiver writes one frame while the next is read.
        return 0

    def put(self, frame: Frame, memory: PageMemory, block_ids: BlockIds, position: int) -> bytes:
        checksum = memory.copy_out(frame.slot, block_ids, self._ring.view(position, frame.payload_bytes))
        return frame._replace(checksum=checksum).pack() + OFFSET.pack(position)

    def settle(self) -> None:
        unlink_ring(self.ring_name)

    def close(self) -> None:
        """The mapping goes with this."""
