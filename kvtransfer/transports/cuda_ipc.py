"""Pages stay in the sender's pool, where the receiver's GPU reads them; headers take a Unix socket. For one host.

The receiver copies each page once, from pool to pool, after it has checked whom it is from. With a buffer in between
the GPU's memory would move each byte four times rather than twice, which is all that bounds such a copy, and two
processes on one GPU would take turns on it for each buffer. The sender's GPU does nothing for it.

The sender waits for what computes the pages, and not the receiver's stream: that would never go on if the sender died
before its event was recorded. No byte is checksummed on this way. A sender that takes pages back, because their push
has ended, says so in memory that both share, where the receiver looks after each copy.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import socket
import threading
from typing import TYPE_CHECKING, ClassVar

from baton.errors import UnavailableError
from baton.internal.v1 import transfer_pb2
from kvtransfer.device_pages import DevicePages
from kvtransfer.frame import Frame
from kvtransfer.pages import BlockIds, PageMemory
from kvtransfer.pool_source import BLOCK_ID, GENERATION, Generations
from kvtransfer.ring import create_ring, sweep_rings, unlink_ring
from kvtransfer.transports.base import Control, TransportUnavailableError, Wire, WireEvents, WireSettings
from kvtransfer.transports.shm import SocketListener, SocketPipe, is_on_this_host
from kvtransfer.transports.stream import MAX_FRAMES, StreamWire

if TYPE_CHECKING:
    from kvtransfer.receiver import Receiver

# Most heads of pages in one frame: its header names a block for each page, and must fit a message of the socket.
MAX_HEADS = 8192
# How long a link that ends waits for a receiver that does not hang up.
_LINGER_S = 1.0
# What a header can say.
_MAX_PAYLOAD_BYTES = 1 << 30


class CudaIpcTransport:
    name: ClassVar[str] = "cuda_ipc"

    def carries(self, memory: PageMemory) -> bool:
        return isinstance(memory, DevicePages)

    def listen(self, receiver: Receiver, host: str) -> SocketListener:
        return SocketListener(receiver, self.name)

    def reaches(self, offer: transfer_pb2.TransportOffer) -> bool:
        # Whether one GPU reads the other the receiver finds out when it maps the pool.
        return is_on_this_host(offer)

    def connect(
        self, offer: transfer_pb2.TransportOffer, settings: WireSettings, events: WireEvents
    ) -> tuple[Wire, Control]:
        sweep_rings()
        memory = settings.memory
        assert isinstance(memory, DevicePages)
        max_payload_bytes = min(MAX_HEADS * memory.head_bytes, _MAX_PAYLOAD_BYTES)
        settings = dataclasses.replace(settings, max_payload_bytes=max_payload_bytes)
        pipe = LingeringPipe(offer.address, settings.timeout_s)
        try:
            payloads = PoolPayloads(memory, max_payload_bytes)
        except OSError as error:
            pipe.close()
            raise TransportUnavailableError(f"this pool cannot be shared with other processes: {error}") from error
        return StreamWire(pipe, offer.address, settings, payloads, events).connected(settings)


class LingeringPipe(SocketPipe):
    """Ends when the receiver has hung up, which it does once it has unmapped the pool: the pool must not go before."""

    def __init__(self, address: str, timeout_s: float) -> None:
        self._hung_up = threading.Event()
        super().__init__(address, timeout_s)

    def receive(self) -> bytes:
        try:
            return super().receive()
        except UnavailableError:
            self._hung_up.set()
            raise

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        self._hung_up.wait(_LINGER_S)
        super().end()


class PoolPayloads:
    """Raises OSError where the pool cannot be shared, or there is no shared memory."""

    def __init__(self, memory: DevicePages, max_payload_bytes: int) -> None:
        # Nothing is filled: the number of frames is what bounds them.
        self.capacity_bytes = MAX_FRAMES * max_payload_bytes
        self._pool = transfer_pb2.DevicePool(
            handle=memory.device.export(memory.pages),
            num_slots=memory.num_slots,
            num_blocks=memory.num_blocks,
            first_head=memory.heads.first,
            num_heads=memory.heads.count,
            head_bytes=memory.head_bytes,
        )
        self._ring_name, ring = create_ring(MAX_FRAMES * 8)
        self._generations = Generations(ring, MAX_FRAMES)
        self._num_frames = 0
        # Frames that may be under way: generation and reservation.
        self._recent: collections.deque[tuple[int, int]] = collections.deque(maxlen=MAX_FRAMES)

    def announce(self, hello: transfer_pb2.StreamHello) -> None:
        hello.ring_name, hello.ring_bytes = self._ring_name, MAX_FRAMES * 8
        hello.pool.CopyFrom(self._pool)

    def max_message_bytes(self, max_payload_bytes: int) -> int:
        # The receiver takes what has come together, while it copies what came before.
        return 0

    def put(self, frame: Frame, memory: PageMemory, block_ids: BlockIds, position: int) -> bytes:
        self._num_frames += 1
        generation = self._num_frames
        self._generations.set(generation)
        self._recent.append((generation, frame.reservation))
        return frame.pack() + GENERATION.pack(generation) + block_ids.astype(BLOCK_ID).tobytes()

    def settle(self) -> None:
        unlink_ring(self._ring_name)

    def withdraw(self, reservation: int) -> None:
        for generation, other in self._recent:
            if other == reservation:
                self._generations.take_back(generation)

    def close(self) -> None:
        """What was put for pushes that have not ended is withdrawn when they are told."""
