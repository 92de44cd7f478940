"""A `torch.distributed` group of two processes: payloads pass between them as tensors.

It is made without the default group, so that any two workers can have one, and a peer can come and go. What the two
must know of each other to connect passes through a store that lies on the stream they have already; there is no server
for it, and no process outside the pair takes part.
"""

from __future__ import annotations

import datetime
import socket
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch._C import _distributed_c10d as c10d

from baton.errors import TransferError, UnavailableError
from kvtransfer.pages import Bytes

SENDER, RECEIVER = 0, 1
_SIZE = 2
# Two are needed.
_MAX_KEYS = 16
# Payloads pass in order, so tags may come again; Gloo has them as an int.
_NUM_TAGS = 1 << 20


class Pending(Protocol):
    """A payload on its way."""

    def wait(self, timeout: datetime.timedelta) -> bool: ...


class LocalStore(c10d.Store):
    """The pair's store, at the receiver. Any thread may call; the keys are few and small."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__()
        self._timeout_s = timeout_s
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._closed = False

    def set(self, key: str, value: bytes | str) -> None:
        """Raises TransferError where there are too many keys."""
        with self._changed:
            if len(self._values) == _MAX_KEYS:
                raise TransferError(f"the store has {_MAX_KEYS} keys already")
            self._values[key] = value if isinstance(value, bytes) else value.encode()
            self._changed.notify_all()

    def get(self, key: str) -> bytes:
        """Waits until the key is there; raises UnavailableError where it does not come in time."""
        with self._changed:
            self._changed.wait_for(lambda: key in self._values or self._closed, self._timeout_s)
            if self._closed:
                raise UnavailableError("the stream has ended")
            if key not in self._values:
                raise UnavailableError(f"the peer did not say {key!r} within {self._timeout_s:g} s")
            return self._values[key]

    def wait(self, keys: list[str], timeout: datetime.timedelta | None = None) -> None:
        for key in keys:
            self.get(key)

    def close(self) -> None:
        """Whoever waits, waits no longer."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class RemoteStore(c10d.Store):
    """The same store from the sender.

    Args:
        ask: sets a key to a value or, given None, waits for one that the receiver sets; returns the value.
    """

    def __init__(self, ask: Callable[[str, bytes | None], bytes]) -> None:
        super().__init__()
        self._ask = ask
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: bytes | str) -> None:
        self._values[key] = self._ask(key, value if isinstance(value, bytes) else value.encode())

    def get(self, key: str) -> bytes:
        if key not in self._values:
            self._values[key] = self._ask(key, None)
        return self._values[key]

    def wait(self, keys: list[str], timeout: datetime.timedelta | None = None) -> None:
        for key in keys:
            self.get(key)


class PairGroup:
    """One of the two ends. Gloo, for memory of the host.

    Blocks until the other end has joined.

    Args:
        rank: SENDER or RECEIVER.
        host: address of this process's own, on which the other connects to it.
        timeout_s: longest wait for the other end, and for one payload.

    Raises:
        UnavailableError: the other end did not join in time.
    """

    def __init__(self, store: c10d.Store, rank: int, *, host: str, timeout_s: float) -> None:
        self._timeout = datetime.timedelta(seconds=timeout_s)
        self._peer = 1 - rank
        self._num_payloads = 0
        # More than torch's annotations know of it.
        gloo: Any = c10d.ProcessGroupGloo
        options = gloo._Options()
        options._timeout = self._timeout
        try:
            options._devices = [gloo.create_device(hostname=host)]
            self._group = gloo(store, rank, _SIZE, options)
        except RuntimeError as error:
            raise UnavailableError(f"no group of two by way of {host}: {error}") from error

    def send(self, payload: Bytes) -> Pending:
        """Begins to send uint8 [n], which must stay as it is until the other end has received it.

        Raises:
            UnavailableError: the other end is gone.
        """
        try:
            pending: Pending = self._group.send([torch.from_numpy(payload)], self._peer, self._next_tag())
        except RuntimeError as error:
            raise UnavailableError(f"a payload did not leave: {error}") from error
        return pending

    def receive(self, into: Bytes) -> None:
        """Waits for what the other end sends next.

        Raises:
            UnavailableError: it is gone, or sent nothing in time.
        """
        try:
            self._group.recv([torch.from_numpy(into)], self._peer, self._next_tag()).wait(self._timeout)
        except RuntimeError as error:
            raise UnavailableError(f"a payload did not come: {error}") from error

    def close(self) -> None:
        """Hangs up; the other end finds that out at once. Nothing may be sent or received any more. Idempotent."""
        self._group = None

    def _next_tag(self) -> int:
        tag = self._num_payloads % _NUM_TAGS
        self._num_payloads += 1
        return tag


def own_address(peer: str) -> str:
    """The address that this host has towards `peer`, host:port; nothing is sent."""
    host, _, port = peer.rpartition(":")
    family, _, _, _, target = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])
