"""A transport that does what a plan says to single frames; everything else goes the way of the real one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import ClassVar, TypeAlias

from baton.errors import UnavailableError
from baton.internal.v1 import transfer_pb2
from kvtransfer import transports
from kvtransfer.frame import Frame
from kvtransfer.pages import BlockIds, Bytes, HeadRange, PageMemory
from kvtransfer.transports.base import Control, Transport, Wire, WireEvents, WireSettings

# Does with a frame whatever it likes, given the real wire.
Fault: TypeAlias = Callable[[Wire, Frame, PageMemory, BlockIds], None]
# Which fault befalls a frame, if any.
Plan: TypeAlias = Callable[[Frame], Fault | None]


class FlippingMemory:
    """Flips the last bit of what is read, after its checksum was taken."""

    def __init__(self, memory: PageMemory) -> None:
        self.num_slots, self.num_blocks = memory.num_slots, memory.num_blocks
        self.page_bytes, self.heads, self.head_bytes = memory.page_bytes, memory.heads, memory.head_bytes
        self.copy_in, self.mark = memory.copy_in, memory.mark
        self._memory = memory

    def copy_out(self, slot: int, block_ids: BlockIds, heads: HeadRange, out: Bytes) -> int:
        checksum = self._memory.copy_out(slot, block_ids, heads, out)
        out[-1] ^= 1
        return checksum


def drop(wire: Wire, frame: Frame, memory: PageMemory, block_ids: BlockIds) -> None:
    """The frame is lost."""


def duplicate(wire: Wire, frame: Frame, memory: PageMemory, block_ids: BlockIds) -> None:
    wire.send(frame, memory, block_ids)
    wire.send(frame, memory, block_ids)


def corrupt(wire: Wire, frame: Frame, memory: PageMemory, block_ids: BlockIds) -> None:
    """One bit of the payload flips on the way."""
    wire.send(frame, FlippingMemory(memory), block_ids)


def break_stream(wire: Wire, frame: Frame, memory: PageMemory, block_ids: BlockIds) -> None:
    wire.close()
    raise UnavailableError("the stream broke")


def hold(reached: threading.Event, go_on: threading.Event) -> Fault:
    """The frame is late: `reached` tells when it is its turn, `go_on` lets it go."""

    def run(wire: Wire, frame: Frame, memory: PageMemory, block_ids: BlockIds) -> None:
        reached.set()
        go_on.wait()
        wire.send(frame, memory, block_ids)

    return run


def at(seq: int, fault: Fault) -> Plan:
    """The fault befalls this frame of every push."""
    return lambda frame: fault if frame.seq == seq else None


class FaultyTransports:
    """A `load` for `Sender`."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def __call__(self, name: str) -> Transport:
        return FaultyTransport(transports.load(name), self._plan)


class FaultyTransport:
    name: ClassVar[str] = ""

    def __init__(self, real: Transport, plan: Plan) -> None:
        self.name = real.name  # type: ignore[misc]
        self.carries = real.carries
        self.listen = real.listen
        self.reaches = real.reaches
        self._real = real
        self._plan = plan

    def connect(
        self, offer: transfer_pb2.TransportOffer, settings: WireSettings, events: WireEvents
    ) -> tuple[Wire, Control]:
        wire, control = self._real.connect(offer, settings, events)
        return FaultyWire(wire, self._plan), control


class FaultyWire:
    def __init__(self, real: Wire, plan: Plan) -> None:
        self.max_payload_bytes = real.max_payload_bytes
        self.has_room = real.has_room
        self.flush = real.flush
        self.withdraw = real.withdraw
        self.close = real.close
        self._real = real
        self._plan = plan

    @property
    def awaits_reply(self) -> bool:
        return self._real.awaits_reply

    def send(self, frame: Frame, memory: PageMemory, block_ids: BlockIds) -> None:
        fault = self._plan(frame)
        if fault is None:
            self._real.send(frame, memory, block_ids)
        else:
            fault(self._real, frame, memory, block_ids)
