"""Steps of a transfer as the receiver sees them: tests that use them are the data plane's threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import xxhash

from baton.config import TransferConfig
from baton.errors import (
    BatonError,
)
from baton.internal.v1 import transfer_pb2
from kvtransfer.arrival import HostCarrier
from kvtransfer.frame import Frame
from kvtransfer.pages import BlockIds, Bytes, HeadRange, HostPages
from kvtransfer.reservation import Origin
from tests.kvtransfer.sides import HYBRID, WAIT_S, DecodeSide, ref

CONFIG = TransferConfig(transports=("grpc",))
SENDER = Origin("prefill-0", 2)
A, B = ref("a"), ref("b")


class GatedMemory(HostPages):
    """Once shut, stops every copy-in between its check and its write until the gate opens."""

    def __init__(self, pages: Bytes, heads: HeadRange) -> None:
        super().__init__(pages, heads)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)

    def copy_in(self, slot: int, block_ids: BlockIds, heads: HeadRange, payload: Bytes) -> int:
        self.entered.release()
        assert self.gate.wait(WAIT_S)
        return super().copy_in(slot, block_ids, heads, payload)


def open_request(ticket: transfer_pb2.Ticket, **changes: Any) -> transfer_pb2.OpenRequest:
    fields: dict[str, Any] = {
        "ref": ticket.ref,
        "reservation": ticket.reservation,
        "layout": ticket.layout,
        "first_head": 0,
        "num_heads": ticket.layout.num_kv_heads,
    }
    return transfer_pb2.OpenRequest(**(fields | changes))


def let_in(decode: DecodeSide, ticket: transfer_pb2.Ticket, origin: Origin = SENDER, **changes: Any) -> None:
    decode.receiver.open(open_request(ticket, **changes), origin)


def opened(decode: DecodeSide, *blocks: tuple[int, int, list[int]], name: Any = A) -> transfer_pb2.Ticket:
    ticket = decode.reserve(name, *blocks)
    let_in(decode, ticket)
    return ticket


def payload_of(num_blocks: int, seed: int = 3) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, num_blocks * HYBRID.page_bytes, dtype=np.uint8)


def frame_of(
    ticket: transfer_pb2.Ticket, seq: int, group: int, slot: int, first_block: int, payload: Bytes, **changes: Any
) -> Frame:
    return Frame(
        reservation=ticket.reservation,
        attempt=ticket.ref.attempt,
        seq=seq,
        group=group,
        slot=slot,
        first_head=0,
        num_heads=HYBRID.num_kv_heads,
        first_block=first_block,
        num_blocks=len(payload) // HYBRID.page_bytes,
        payload_bytes=len(payload),
        checksum=xxhash.xxh3_64_intdigest(payload.data),
    )._replace(**changes)


def write(decode: DecodeSide, frame: Frame, payload: Bytes, origin: Origin = SENDER) -> BatonError | None:
    (refusal,) = decode.receiver.write([(frame, payload)], origin, HostCarrier("grpc"))
    return refusal


def fill(decode: DecodeSide, ticket: transfer_pb2.Ticket) -> int:
    """Writes every page that the ticket asks for, a frame for each slot; returns the number of frames."""
    seq = 0
    for wanted in ticket.ranges:
        for slot in range(len(HYBRID.groups[wanted.group].layers)):
            payload = payload_of(wanted.num_blocks)
            assert (
                write(decode, frame_of(ticket, seq, wanted.group, slot, wanted.first_block, payload), payload) is None
            )
            seq += 1
    return seq


def commit(decode: DecodeSide, ticket: transfer_pb2.Ticket, num_frames: int, origin: Origin = SENDER) -> None:
    request = transfer_pb2.CommitRequest(ref=ticket.ref, reservation=ticket.reservation, num_frames=num_frames)
    decode.receiver.commit(request, origin)


def abort(decode: DecodeSide, ticket: transfer_pb2.Ticket, reason: str = "why not") -> None:
    decode.receiver.abort(transfer_pb2.AbortRequest(ref=ticket.ref, reservation=ticket.reservation, reason=reason))


def in_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call)
    thread.start()
    return thread
