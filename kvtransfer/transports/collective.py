"""Payloads through a `torch.distributed` group of the two, headers over gRPC: Gloo, between any two hosts' memories.

A payload passes as it lies, with no message around it that would be built, parsed and copied once more.
"""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch.distributed as dist

from baton.errors import BatonError
from baton.internal.v1 import transfer_pb2
from kvtransfer.data_server import DataServer
from kvtransfer.frame import Frame
from kvtransfer.pages import BlockIds, Bytes, PageMemory
from kvtransfer.pair_group import SENDER, PairGroup, Pending, RemoteStore, own_address
from kvtransfer.transports.base import Control, TransportUnavailableError, Wire, WireEvents, WireSettings
from kvtransfer.transports.grpc import GrpcPipe
from kvtransfer.transports.stream import MAX_FRAMES, StreamControl, StreamWire

if TYPE_CHECKING:
    from kvtransfer.receiver import Receiver

_MAX_MESSAGE_BYTES = 64 << 10


class CollectiveTransport:
    name: ClassVar[str] = "collective"

    def listen(self, receiver: Receiver, host: str) -> CollectiveListener:
        if not dist.is_available() or not dist.is_gloo_available():
            raise TransportUnavailableError("this torch was built without Gloo")
        return CollectiveListener(receiver, host)

    def reaches(self, offer: transfer_pb2.TransportOffer) -> bool:
        return dist.is_available() and dist.is_gloo_available()

    def connect(
        self, offer: transfer_pb2.TransportOffer, settings: WireSettings, events: WireEvents
    ) -> tuple[Wire, Control]:
        payloads = GroupPayloads(settings.window_bytes)
        wire = StreamWire(GrpcPipe(offer.address, _MAX_MESSAGE_BYTES), offer.address, settings, payloads, events)

        def ask(key: str, value: bytes | None) -> bytes:
            call = transfer_pb2.StreamCall(store=transfer_pb2.StoreCall(key=key, value=value))
            return wire.ask(call, settings.timeout_s).value

        try:
            payloads.group = PairGroup(
                RemoteStore(ask), SENDER, host=own_address(offer.address), timeout_s=settings.timeout_s
            )
        except (BatonError, OSError) as error:
            wire.close()
            raise TransportUnavailableError(f"no group with {offer.address}: {error}") from error
        return wire, StreamControl(wire, settings)


class CollectiveListener:
    def __init__(self, receiver: Receiver, host: str) -> None:
        self._server = DataServer(receiver, host)
        self.offer = transfer_pb2.TransportOffer(transport=CollectiveTransport.name, address=self._server.address)

    def close(self) -> None:
        self._server.close()


class GroupPayloads:
    """Payloads lie in a staging buffer until they are acknowledged.

    Attributes:
        group: the sender's end of the pair, once both have joined.
    """

    ring_name = ""
    in_group = True

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.group: PairGroup | None = None
        self._staging: Bytes = np.empty(capacity_bytes, dtype=np.uint8)
        # Gloo wants each to be held while it is under way. More than MAX_FRAMES of them cannot be.
        self._sent: collections.deque[Pending] = collections.deque(maxlen=MAX_FRAMES)

    def max_message_bytes(self, max_payload_bytes: int) -> int:
        # The receiver takes payloads as their headers come.
        return 0

    def put(self, frame: Frame, memory: PageMemory, block_ids: BlockIds, position: int) -> bytes:
        assert self.group is not None
        payload = self._staging[position : position + frame.payload_bytes]
        checksum = memory.copy_out(frame.slot, block_ids, payload)
        self._sent.append(self.group.send(payload))
        return frame._replace(checksum=checksum).pack()

    def settle(self) -> None:
        """There is nothing to tidy up."""

    def close(self) -> None:
        self._sent.clear()
        if self.group is not None:
            self.group.close()
