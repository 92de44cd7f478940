"""Payloads in gRPC messages, behind their headers: works between any two hosts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from baton.internal.v1 import transfer_pb2
from kvtransfer.frame import Frame
from kvtransfer.pages import BlockIds, PageMemory
from kvtransfer.transports.base import Wire, WireEvents, WireSettings
from kvtransfer.transports.stream import StreamTransport, StreamWire

if TYPE_CHECKING:
    from kvtransfer.receiver import Receiver


class GrpcTransport(StreamTransport):
    name = "grpc"

    def offer(self, receiver: Receiver, data_address: str) -> transfer_pb2.TransportOffer:
        return transfer_pb2.TransportOffer(transport=self.name, address=data_address)

    def reaches(self, offer: transfer_pb2.TransportOffer) -> bool:
        return True

    def connect(self, offer: transfer_pb2.TransportOffer, settings: WireSettings, events: WireEvents) -> Wire:
        return StreamWire(offer.address, settings, InlinePayloads(settings.window_bytes), events)


class InlinePayloads:
    """The one copy on the sending side is the message."""

    ring_name = ""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes

    def put(self, frame: Frame, memory: PageMemory, block_ids: BlockIds, position: int) -> bytes:
        return b"".join([frame.pack(), *memory.views(frame.slot, block_ids)])

    def settle(self) -> None:
        """There is nothing to tidy up."""
