"""Payloads in a shared-memory ring of the sender; the stream carries headers only. For two processes of one host."""

from __future__ import annotations

from typing import TYPE_CHECKING

from baton.internal.v1 import transfer_pb2
from kvtransfer.data_server import OFFSET
from kvtransfer.frame import Frame
from kvtransfer.pages import BlockIds, PageMemory
from kvtransfer.ring import create_ring, shm_domain, sweep_rings, unlink_ring
from kvtransfer.transports.base import TransportUnavailableError, Wire, WireEvents, WireSettings
from kvtransfer.transports.stream import StreamTransport, StreamWire

if TYPE_CHECKING:
    from kvtransfer.receiver import Receiver


class ShmTransport(StreamTransport):
    name = "shm"

    def offer(self, receiver: Receiver, data_address: str) -> transfer_pb2.TransportOffer:
        sweep_rings()
        return transfer_pb2.TransportOffer(transport=self.name, address=data_address, domain=shm_domain())

    def reaches(self, offer: transfer_pb2.TransportOffer) -> bool:
        return offer.domain != "" and offer.domain == shm_domain()

    def connect(self, offer: transfer_pb2.TransportOffer, settings: WireSettings, events: WireEvents) -> Wire:
        sweep_rings()
        try:
            payloads = RingPayloads(settings.window_bytes)
        except OSError as error:
            raise TransportUnavailableError(
                f"no shared memory for a ring of {settings.window_bytes} bytes: {error}"
            ) from error
        return StreamWire(offer.address, settings, payloads, events)


class RingPayloads:
    """Raises OSError where there is no room for the ring."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.ring_name, self._ring = create_ring(capacity_bytes)

    def put(self, frame: Frame, memory: PageMemory, block_ids: BlockIds, position: int) -> bytes:
        memory.copy_out(frame.slot, block_ids, self._ring.view(position, frame.payload_bytes))
        return frame.pack() + OFFSET.pack(position)

    def settle(self) -> None:
        unlink_ring(self.ring_name)
