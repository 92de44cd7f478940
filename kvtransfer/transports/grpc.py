"""Payloads in gRPC messages, behind their headers: works between any two hosts."""

from __future__ import annotations

import queue
from typing import TYPE_CHECKING, ClassVar

import grpc
import numpy as np

from baton.errors import UnavailableError
from baton.internal.v1 import transfer_pb2
from kvtransfer.channel import rpc_failure, stream_options
from kvtransfer.data_server import METHOD, DataServer, max_message_bytes
from kvtransfer.frame import HEADER_BYTES, Frame
from kvtransfer.heap import keep_freed_memory
from kvtransfer.message import new_message
from kvtransfer.pages import BlockIds, PageMemory
from kvtransfer.transports.base import Control, Wire, WireEvents, WireSettings
from kvtransfer.transports.stream import StreamWire

if TYPE_CHECKING:
    from kvtransfer.receiver import Receiver


class GrpcTransport:
    name: ClassVar[str] = "grpc"

    def carries(self, memory: PageMemory) -> bool:
        return True

    def listen(self, receiver: Receiver, host: str) -> GrpcListener:
        return GrpcListener(receiver, host)

    def reaches(self, offer: transfer_pb2.TransportOffer) -> bool:
        return True

    def connect(
        self, offer: transfer_pb2.TransportOffer, settings: WireSettings, events: WireEvents
    ) -> tuple[Wire, Control]:
        payloads = InlinePayloads(settings.window_bytes)
        pipe = GrpcPipe(offer.address, payloads.max_message_bytes(settings.max_payload_bytes))
        return StreamWire(pipe, offer.address, settings, payloads, events).connected(settings)


class GrpcListener:
    def __init__(self, receiver: Receiver, host: str) -> None:
        self._server = DataServer(receiver, host)
        self.offer = transfer_pb2.TransportOffer(transport=GrpcTransport.name, address=self._server.address)

    def close(self) -> None:
        self._server.close()


class GrpcPipe:
    """One bidirectional stream of raw bytes; a thread of gRPC's takes what goes out."""

    def __init__(self, address: str, max_message_bytes: int) -> None:
        keep_freed_memory()
        self._address = address
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._channel = grpc.insecure_channel(address, options=stream_options(max_message_bytes))
        stream: grpc.StreamStreamMultiCallable[bytes, bytes] = self._channel.stream_stream(METHOD)
        self._call = stream(iter(self._outbox.get, None))

    def send(self, message: bytes) -> None:
        self._outbox.put(message)

    def receive(self) -> bytes:
        try:
            return next(self._call)
        except StopIteration:
            raise UnavailableError(f"{self._address} ended the stream") from None
        except grpc.RpcError:
            raise rpc_failure(self._address, self._call) from None

    def end(self) -> None:
        self._outbox.put(None)
        self._call.cancel()

    def close(self) -> None:
        self._channel.close()


class InlinePayloads:
    """The one copy on the sending side is the message."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes

    def max_message_bytes(self, max_payload_bytes: int) -> int:
        return max_message_bytes(max_payload_bytes)

    def put(self, frame: Frame, memory: PageMemory, block_ids: BlockIds, position: int) -> bytes:
        message, content = new_message(HEADER_BYTES + frame.payload_bytes)
        checksum = memory.copy_out(frame.slot, block_ids, frame.heads, content[HEADER_BYTES:])
        content[:HEADER_BYTES] = np.frombuffer(frame._replace(checksum=checksum).pack(), dtype=np.uint8)
        return message

    def announce(self, hello: transfer_pb2.StreamHello) -> None:
        """A hello that says nothing means them."""

    def settle(self) -> None:
        """There is nothing to tidy up."""

    def withdraw(self, reservation: int) -> None:
        """They are copies."""

    def close(self) -> None:
        """Nothing is held."""
