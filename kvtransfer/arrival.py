"""What a receiver is given to copy in: frames that it has claimed, and a carrier that knows how their payloads lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

from baton.errors import BatonError, TransferError
from kvtransfer.frame import Frame
from kvtransfer.pages import BlockIds, Bytes, PageMemory

# Bytes on the host, or whatever else tells a carrier where they are.
Payload = TypeVar("Payload")


class Arrival(NamedTuple, Generic[Payload]):
    """
    Attributes:
        block_ids: where the receiver wants the pages of the frame.
    """

    frame: Frame
    block_ids: BlockIds
    payload: Payload


class Carrier(Protocol[Payload]):
    """
    Attributes:
        transport: that the frames count for.
    """

    transport: str

    def copy_in(self, memory: PageMemory, arrivals: Sequence[Arrival[Payload]]) -> list[BatonError | None]:
        """Copies all in and verifies them where they lie then; why each is not what its sender sent, or None.

        StaleAttemptError means that the sender has taken it back.
        """


class HostCarrier:
    """Of payloads in host memory, uint8 [payload_bytes]; they are verified by their checksum."""

    def __init__(self, transport: str) -> None:
        self.transport = transport

    def copy_in(self, memory: PageMemory, arrivals: Sequence[Arrival[Bytes]]) -> list[BatonError | None]:
        return [self._copy_in(memory, arrival) for arrival in arrivals]

    def _copy_in(self, memory: PageMemory, arrival: Arrival[Bytes]) -> BatonError | None:
        frame = arrival.frame
        if memory.copy_in(frame.slot, arrival.block_ids, frame.heads, arrival.payload) == frame.checksum:
            return None
        return TransferError(f"frame {frame.seq} is corrupt: its checksum is not that of the bytes in the pool")
