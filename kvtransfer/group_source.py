"""The receiver's end of payloads that pass in a group."""

from __future__ import annotations

import threading

import numpy as np

from baton.errors import BatonError, TransferError, UnavailableError
from baton.internal.v1 import transfer_pb2
from kvtransfer.frame import Frame
from kvtransfer.pages import Bytes
from kvtransfer.pair_group import RECEIVER, LocalStore, PairGroup


class GroupSource:
    """From the group that the sender makes with this process, in the order of the frames.

    Joining it blocks until both have, so a thread does that while the stream's answers the sender's calls on the store.

    Args:
        host: this process's address for the group.
        max_payload_bytes: largest payload of a frame.
        timeout_s: longest wait for the sender.
    """

    transport = "collective"

    def __init__(self, host: str, max_payload_bytes: int, timeout_s: float) -> None:
        self._store = LocalStore(timeout_s)
        self._host = host
        self._timeout_s = timeout_s
        self._buffer = np.empty(max_payload_bytes, dtype=np.uint8)
        self._joined: PairGroup | BatonError | None = None
        self._joining = threading.Thread(target=self._join, name="kv-join", daemon=True)
        self._joining.start()

    def payload(self, frame: Frame, message: bytes, offset: int) -> tuple[Bytes, int]:
        if frame.payload_bytes > len(self._buffer):
            raise TransferError(f"frame {frame.seq} has {frame.payload_bytes} bytes, more than {len(self._buffer)}")
        self._joining.join()
        if not isinstance(self._joined, PairGroup):
            raise self._joined or UnavailableError("the group's thread failed")
        payload = self._buffer[: frame.payload_bytes]
        self._joined.receive(payload)
        return payload, offset

    def store(self, call: transfer_pb2.StoreCall) -> bytes:
        if call.HasField("value"):
            self._store.set(call.key, call.value)
        return self._store.get(call.key)

    def close(self) -> None:
        self._store.close()
        self._joining.join()
        if isinstance(self._joined, PairGroup):
            self._joined.close()

    def _join(self) -> None:
        try:
            self._joined = PairGroup(self._store, RECEIVER, host=self._host, timeout_s=self._timeout_s)
        except BatonError as error:
            self._joined = error
