"""Sender and receiver in one process: frames and control are calls.

For tests and experiments that compose both sides; in a cluster every worker is a process of its own.
"""

from __future__ import annotations

import os
import secrets
import weakref
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from baton.errors import BatonError, UnavailableError
from baton.internal.v1 import transfer_pb2
from kvtransfer.arrival import HostCarrier
from kvtransfer.frame import Frame
from kvtransfer.pages import BlockIds, PageMemory
from kvtransfer.reservation import Origin
from kvtransfer.transports.base import Answer, Control, Wire, WireEvents, WireSettings

if TYPE_CHECKING:
    from kvtransfer.receiver import Receiver

# The process is the network here, so its address book is the process's: address -> receiver, while it lives.
_RECEIVERS: weakref.WeakValueDictionary[str, Receiver] = weakref.WeakValueDictionary()
_TOKEN = secrets.token_hex(8)


def _domain() -> str:
    # The pid tells a forked child, which inherits the token, from its parent.
    return f"pid:{os.getpid()}:{_TOKEN}"


class LoopbackTransport:
    name: ClassVar[str] = "loopback"

    def carries(self, memory: PageMemory) -> bool:
        return True

    def listen(self, receiver: Receiver, host: str) -> LoopbackListener:
        return LoopbackListener(receiver)

    def reaches(self, offer: transfer_pb2.TransportOffer) -> bool:
        return offer.domain == _domain()

    def connect(
        self, offer: transfer_pb2.TransportOffer, settings: WireSettings, events: WireEvents
    ) -> tuple[Wire, Control]:
        receiver = _RECEIVERS.get(offer.address)
        if receiver is None:
            raise UnavailableError(f"receiver {offer.address} is gone")
        return LoopbackWire(receiver, settings.origin, events), LoopbackControl(receiver, settings.origin)


class LoopbackListener:
    """An entry of the address book, which ends with the receiver."""

    def __init__(self, receiver: Receiver) -> None:
        address = f"{receiver.worker}/{receiver.epoch}/{id(receiver):x}"
        _RECEIVERS[address] = receiver
        self.offer = transfer_pb2.TransportOffer(transport=LoopbackTransport.name, address=address, domain=_domain())

    def close(self) -> None:
        """A closed receiver refuses by itself."""


class LoopbackWire:
    """Writes into the receiver from the link's thread."""

    awaits_reply = False

    def __init__(self, receiver: Receiver, origin: Origin, events: WireEvents) -> None:
        self.max_payload_bytes = receiver.max_payload_bytes
        self._receiver = receiver
        self._origin = origin
        self._events = events

    def has_room(self) -> bool:
        return True

    def send(self, frame: Frame, memory: PageMemory, block_ids: BlockIds) -> None:
        payload = np.empty(frame.payload_bytes, dtype=np.uint8)
        sent = frame._replace(checksum=memory.copy_out(frame.slot, block_ids, frame.heads, payload))
        (refusal,) = self._receiver.write([(sent, payload)], self._origin, HostCarrier(LoopbackTransport.name))
        if refusal is not None:
            self._events.refused(frame.reservation, refusal)

    def withdraw(self, reservation: int) -> None:
        """All was copied in at once."""

    def flush(self) -> None:
        """Nothing stays."""

    def close(self) -> None:
        """Nothing to end."""


class LoopbackControl:
    def __init__(self, receiver: Receiver, origin: Origin) -> None:
        self._receiver = receiver
        self._origin = origin

    def open(self, request: transfer_pb2.OpenRequest, answer: Answer) -> None:
        try:
            self._receiver.open(request, self._origin)
        except BatonError as error:
            answer(error)
        else:
            answer(None)

    def commit(self, request: transfer_pb2.CommitRequest, answer: Answer) -> None:
        try:
            self._receiver.commit(request, self._origin)
        except BatonError as error:
            answer(error)
        else:
            answer(None)

    def abort(self, request: transfer_pb2.AbortRequest) -> None:
        self._receiver.abort(request)

    def close(self) -> None:
        """Nothing is under way."""
