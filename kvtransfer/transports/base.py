"""What a transport is to both ends of a link: an offer, a wire for frames, and a control path.

A link's thread is the only one that connects, sends and closes. Acknowledgements may come from any thread.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeAlias

from baton.errors import BatonError, UnavailableError
from baton.internal.v1 import transfer_pb2
from kvtransfer.frame import Frame
from kvtransfer.pages import BlockIds, PageMemory
from kvtransfer.reservation import Origin

if TYPE_CHECKING:
    from kvtransfer.receiver import Receiver

# Called once with how a call went.
Answer: TypeAlias = Callable[[BatonError | None], None]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WireSettings:
    """
    Attributes:
        memory: the sender's pool.
        worker, epoch, rank: the receiver incarnation that is meant, and which of its ranks.
        control_address: host:port of its KVTransfer service.
        origin: the sender.
        max_payload_bytes: largest payload of one frame that the sender makes.
        window_bytes: payload that may be under way.
        timeout_s: longest time to connect, and for one control message.
    """

    memory: PageMemory
    worker: str
    epoch: int
    rank: int
    control_address: str
    origin: Origin
    max_payload_bytes: int
    window_bytes: int
    timeout_s: float


class WireEvents(Protocol):
    """What a link hears of its wire, from any thread."""

    def progressed(self) -> None:
        """Frames were acknowledged: there may be room again."""

    def refused(self, reservation: int, error: BatonError) -> None:
        """The receiver did not write a frame of this reservation."""

    def broken(self, error: BatonError) -> None:
        """Nothing goes through any more."""


class Wire(Protocol):
    """Carries the frames of one link in order."""

    @property
    def max_payload_bytes(self) -> int:
        """Largest payload that the receiver takes."""

    @property
    def awaits_reply(self) -> bool:
        """Whether the receiver is to acknowledge frames or to answer a call, once all is flushed."""

    def has_room(self) -> bool:
        """Whether `send` takes a frame of the largest size now."""

    def send(self, frame: Frame, memory: PageMemory, block_ids: BlockIds) -> None:
        """Takes the pages of one frame; only when `has_room`, and when they are computed.

        They are read at once with their checksum; or later, by a receiver that reads them where they lie, until
        `withdraw`. The frame may stay until others fill its message, or until `flush`.
        """

    def withdraw(self, reservation: int) -> None:
        """Whoever still reads pages that were sent for this reservation is to refuse them: they may change."""

    def flush(self) -> None:
        """Lets all frames go; must not block."""

    def close(self) -> None:
        """Ends the wire and its threads."""


class Control(Protocol):
    """Open, Commit and Abort of one link. Answers may come from any thread, also before the call returns."""

    def open(self, request: transfer_pb2.OpenRequest, answer: Answer) -> None: ...

    def commit(self, request: transfer_pb2.CommitRequest, answer: Answer) -> None: ...

    def abort(self, request: transfer_pb2.AbortRequest) -> None:
        """Best effort."""

    def close(self) -> None:
        """Lets aborts that are under way finish, briefly."""


class Listener(Protocol):
    """The receiving end of a transport.

    Attributes:
        offer: what goes into the receiver's tickets.
    """

    offer: transfer_pb2.TransportOffer

    def close(self) -> None:
        """Ends all streams and their threads. Idempotent."""


class Transport(Protocol):
    """A row of the table; stateless."""

    name: ClassVar[str]

    def carries(self, memory: PageMemory) -> bool:
        """Whether it can move the pages of such a pool at all."""

    def listen(self, receiver: Receiver, host: str) -> Listener:
        """Takes frames for `receiver` from now on, on an address of `host` if it needs one.

        Raises:
            TransportUnavailableError: this process cannot be reached this way.
        """

    def reaches(self, offer: transfer_pb2.TransportOffer) -> bool:
        """Whether this process can go the way that is offered."""

    def connect(
        self, offer: transfer_pb2.TransportOffer, settings: WireSettings, events: WireEvents
    ) -> tuple[Wire, Control]:
        """Blocks until the receiver has answered; the control path is the one that goes with this transport.

        Raises:
            TransportUnavailableError: this way cannot be gone; another may.
            BatonError: the receiver is not there, or is not the one that was meant.
        """


class TransportUnavailableError(UnavailableError):
    """This transport does not work between these two processes."""
