"""The receiver's end of payloads that pass in a group."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from baton.errors import BatonError, TransferError, UnavailableError
from baton.internal.v1 import transfer_pb2
from kvtransfer.arrival import Arrival
from kvtransfer.frame import Frame
from kvtransfer.group_ends import ReceivingEnd, join_sender
from kvtransfer.pages import PageMemory
from kvtransfer.pair_group import LocalStore

if TYPE_CHECKING:
    from kvtransfer.receiver import Receiver

logger = logging.getLogger(__name__)

# How long a stream's end waits for the thread that joins, which torch may hold until its time is up; then it is left.
_CLOSE_S = 1.0


class GroupSource:
    """From the group that the sender makes with this process, in the order of the frames.

    Joining it blocks until both have, so a thread does that while the stream's answers the sender's calls on the store.

    Args:
        receiver: whose pool it is for, and what is largest and longest.
        host: this process's address for the group.
        their_device: the GPU that the sender's payloads can leave from, if any.
    """

    transport = "collective"
    in_place = False

    def __init__(self, receiver: Receiver, host: str, their_device: str) -> None:
        self.max_payload_bytes = receiver.max_payload_bytes
        self._receiver = receiver
        self._store = LocalStore(receiver.timeout_s)
        self._host = host
        self._their_device = their_device
        # The group's end, or why there is none; decided once.
        self._decided = threading.Condition()
        self._joined: ReceivingEnd | BatonError | None = None
        self._joining = threading.Thread(target=self._join, name="kv-join", daemon=True)
        self._joining.start()

    def payload(self, frame: Frame, message: bytes, offset: int) -> tuple[Any, int]:
        if frame.payload_bytes > self.max_payload_bytes:
            raise TransferError(
                f"frame {frame.seq} has {frame.payload_bytes} bytes, more than {self.max_payload_bytes}"
            )
        return self._end().receive(frame), offset

    def copy_in(self, memory: PageMemory, arrivals: Sequence[Arrival[Any]]) -> list[BatonError | None]:
        return self._end().copy_in(memory, arrivals)

    def store(self, call: transfer_pb2.StoreCall) -> bytes:
        if call.HasField("value"):
            self._store.set(call.key, call.value)
        return self._store.get(call.key)

    def interrupt(self) -> None:
        self._store.close()
        self._decide(UnavailableError("the stream has ended"))

    def close(self) -> None:
        self.interrupt()
        self._joining.join(_CLOSE_S)
        if self._joined is not None and not isinstance(self._joined, BatonError):
            self._joined.close()

    def _end(self) -> ReceivingEnd:
        """Waits for it; raises BatonError where there is none."""
        with self._decided:
            self._decided.wait_for(lambda: self._joined is not None)
        assert self._joined is not None
        if isinstance(self._joined, BatonError):
            raise self._joined
        return self._joined

    def _join(self) -> None:
        try:
            end = join_sender(
                self._store,
                self._receiver.memory,
                self._their_device,
                host=self._host,
                max_payload_bytes=self.max_payload_bytes,
                timeout_s=self._receiver.timeout_s,
            )
        except BatonError as error:
            self._decide(error)
        except Exception as error:
            # Such as memory that the device does not have; the stream's thread would wait for ever.
            logger.exception("%s cannot join a group", self._receiver.worker)
            self._decide(UnavailableError(f"{self._receiver.worker} cannot join the group: {error!r}"))
        else:
            if not self._decide(end):
                end.close()

    def _decide(self, joined: ReceivingEnd | BatonError) -> bool:
        """Whether it had not been decided."""
        with self._decided:
            if self._joined is not None:
                return False
            self._joined = joined
            self._decided.notify_all()
            return True
