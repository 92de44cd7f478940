"""Payloads through a group of the two, headers over gRPC: NCCL between two GPUs, Gloo between any two hosts' memories.

A payload passes as it lies, with no message around it that would be built, parsed and copied once more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch.distributed as dist

from baton.errors import BatonError
from baton.internal.v1 import transfer_pb2
from kvtransfer.data_server import DataServer
from kvtransfer.frame import Frame
from kvtransfer.pages import BlockIds, PageMemory
from kvtransfer.transports.base import Control, TransportUnavailableError, Wire, WireEvents, WireSettings
from kvtransfer.transports.grpc import GrpcPipe
from kvtransfer.transports.stream import MAX_FRAMES, StreamWire

if TYPE_CHECKING:
    from kvtransfer.group_ends import SendingEnd
    from kvtransfer.receiver import Receiver

_MAX_MESSAGE_BYTES = 64 << 10


class CollectiveTransport:
    name: ClassVar[str] = "collective"

    def carries(self, memory: PageMemory) -> bool:
        return True

    def listen(self, receiver: Receiver, host: str) -> CollectiveListener:
        if not dist.is_available() or not dist.is_gloo_available():
            raise TransportUnavailableError("this torch was built without Gloo")
        return CollectiveListener(receiver, host)

    def reaches(self, offer: transfer_pb2.TransportOffer) -> bool:
        return dist.is_available() and dist.is_gloo_available()

    def connect(
        self, offer: transfer_pb2.TransportOffer, settings: WireSettings, events: WireEvents
    ) -> tuple[Wire, Control]:
        # A torch without its distributed part does all else.
        from kvtransfer.group_ends import group_device, join_receiver
        from kvtransfer.pair_group import RemoteStore, own_address

        payloads = GroupPayloads(settings.window_bytes, group_device(settings.memory))
        wire = StreamWire(GrpcPipe(offer.address, _MAX_MESSAGE_BYTES), offer.address, settings, payloads, events)

        def ask(key: str, value: bytes | None) -> bytes:
            call = transfer_pb2.StreamCall(store=transfer_pb2.StoreCall(key=key, value=value))
            return wire.ask(call, settings.timeout_s).value

        try:
            payloads.end = join_receiver(
                RemoteStore(ask),
                settings.memory,
                host=own_address(offer.address),
                capacity_bytes=settings.window_bytes,
                max_frames=MAX_FRAMES,
                timeout_s=settings.timeout_s,
            )
        except (BatonError, OSError) as error:
            wire.close()
            raise TransportUnavailableError(f"no group with {offer.address}: {error}") from error
        except BaseException:
            wire.close()
            raise
        return wire.connected(settings)


class CollectiveListener:
    def __init__(self, receiver: Receiver, host: str) -> None:
        self._server = DataServer(receiver, host)
        self.offer = transfer_pb2.TransportOffer(transport=CollectiveTransport.name, address=self._server.address)

    def close(self) -> None:
        self._server.close()


class GroupPayloads:
    """Payloads lie in a buffer until they are acknowledged.

    Args:
        device: the GPU that the buffer may lie on.

    Attributes:
        end: the sender's end of the pair, once both have joined.
    """

    def __init__(self, capacity_bytes: int, device: str) -> None:
        self.capacity_bytes = capacity_bytes
        self.end: SendingEnd | None = None
        self._device = device

    def max_message_bytes(self, max_payload_bytes: int) -> int:
        # The receiver takes payloads as their headers come.
        return 0

    def put(self, frame: Frame, memory: PageMemory, block_ids: BlockIds, position: int) -> bytes:
        assert self.end is not None
        return frame._replace(checksum=self.end.send(frame, memory, block_ids, position)).pack()

    def announce(self, hello: transfer_pb2.StreamHello) -> None:
        hello.group, hello.group_device = True, self._device

    def settle(self) -> None:
        """There is nothing to tidy up."""

    def withdraw(self, reservation: int) -> None:
        """They are copies."""

    def close(self) -> None:
        if self.end is not None:
            self.end.close()
