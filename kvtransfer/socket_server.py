"""The receiver's data plane for its own host: a Unix socket whose messages carry headers, beside rings of payloads.

A message takes microseconds here, where it takes half a millisecond through gRPC. The socket's name is an abstract one
of Linux, which goes with its process however that dies. No file mode protects such a name, so both ends ask the kernel
for the other's user and speak to their own alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import struct
import threading
from typing import TYPE_CHECKING

from baton.errors import BatonError, TransferError
from kvtransfer.data_server import MAX_STREAMS
from kvtransfer.session import Session, failure

if TYPE_CHECKING:
    from kvtransfer.receiver import Receiver

logger = logging.getLogger(__name__)

# Largest message of either side.
MAX_MESSAGE_BYTES = 64 << 10
# Joined once: an operation on flags of the enum takes as long as the call.
_PEEK = int(socket.MSG_PEEK | socket.MSG_DONTWAIT)
# Time after which accepting is tried again when it has failed.
_RETRY_S = 0.5
# `struct ucred`: pid, uid, gid.
_CREDENTIALS = struct.Struct("=iII")


class SocketServer:
    """Serves one receiver; raises OSError where there are no such sockets.

    Attributes:
        address: the socket's name, as `socket.bind` takes it but with an @ for the zero byte.
    """

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self.address = f"@baton-{os.getpid()}-{secrets.token_hex(8)}"
        self._lock = threading.Lock()
        self._streams: dict[threading.Thread, socket.socket] = {}
        self._closed = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._listener.bind(abstract(self.address))
            self._listener.listen()
        except BaseException:
            self._listener.close()
            raise
        self._acceptor = threading.Thread(target=self._accept, name="kv-accept", daemon=True)
        self._acceptor.start()

    def close(self) -> None:
        """Ends all streams and their threads. Idempotent."""
        with self._lock:
            self._closed.set()
            streams = dict(self._streams)
        for connection in (self._listener, *streams.values()):
            _shut(connection)
        self._acceptor.join()
        self._listener.close()
        for thread in streams:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if self._closed.is_set():
                    return
                # Such as too many open files, which may pass.
                logger.warning("%s cannot accept a sender: %s", self._receiver.worker, error)
                self._closed.wait(_RETRY_S)
                continue
            if not is_same_user(connection):
                connection.close()
                continue
            thread = threading.Thread(target=self._serve, args=(connection,), name="kv-data", daemon=True)
            with self._lock:
                # A stream stays until its thread has ended, so that closing waits for it to its last step.
                self._streams = {thread: own for thread, own in self._streams.items() if thread.is_alive()}
                if self._closed.is_set() or len(self._streams) == MAX_STREAMS:
                    connection.close()
                    continue
                self._streams[thread] = connection
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            # A peer that is gone ends the stream, and needs no answer.
            with contextlib.suppress(OSError):
                try:
                    self._stream(connection)
                except BatonError as error:
                    connection.send(failure(error))
        finally:
            connection.close()

    def _stream(self, connection: socket.socket) -> None:
        with contextlib.closing(Session(self._receiver, _receive(connection))) as session:
            connection.send(session.reply())
            while message := _receive(connection):
                session.take(message)
                if session.gathers and _has_message(connection):
                    continue
                session.write()
                if session.owes_reply:
                    connection.send(session.reply())


def abstract(address: str) -> str:
    """What to bind or connect a socket to."""
    return "\0" + address.removeprefix("@")


def is_same_user(connection: socket.socket) -> bool:
    """Whether the process at the other end runs as the user of this one."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(credentials)
    return bool(user == os.geteuid())


def _receive(connection: socket.socket) -> bytes:
    """The next message; empty at the end."""
    message = connection.recv(MAX_MESSAGE_BYTES + 1)
    if len(message) > MAX_MESSAGE_BYTES:
        raise TransferError(f"a message has more than {MAX_MESSAGE_BYTES} bytes")
    return message


def _has_message(connection: socket.socket) -> bool:
    """Whether something comes without waiting, the end included."""
    try:
        connection.recv(1, _PEEK)
    except BlockingIOError:
        return False
    return True


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
