"""The receiver's data plane for other hosts: a synchronous gRPC server for streams of frames.

Synchronous, since each stream has a thread that spends its time copying; asyncio reaches a third of its throughput.
Messages are raw bytes.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent import futures
from typing import TYPE_CHECKING, NoReturn

import grpc

from baton.errors import BatonError, TransferError
from kvtransfer.channel import stream_options
from kvtransfer.heap import keep_freed_memory
from kvtransfer.session import Session

if TYPE_CHECKING:
    from kvtransfer.receiver import Receiver

_SERVICE, _NAME = "baton.internal.v1.KVData", "Stream"
METHOD = f"/{_SERVICE}/{_NAME}"
# Each sender has one stream and each stream a thread. More are refused rather than left waiting.
MAX_STREAMS = 256
# Headers, and whatever else is not payload, in one message.
_SLACK_BYTES = 64 << 10


def max_message_bytes(max_payload_bytes: int) -> int:
    """Size limit of one message of the stream."""
    return max_payload_bytes + _SLACK_BYTES


class DataServer:
    """Serves one receiver on a free port.

    Attributes:
        address: host:port.
    """

    def __init__(self, receiver: Receiver, host: str) -> None:
        keep_freed_memory()
        self._receiver = receiver
        self._host = host
        self._lock = threading.Lock()
        self._sessions: set[Session] = set()
        self._closed = False
        self._threads = futures.ThreadPoolExecutor(MAX_STREAMS, thread_name_prefix="kv-data")
        self._server = grpc.server(
            self._threads,
            options=(*stream_options(max_message_bytes(receiver.max_payload_bytes)), ("grpc.so_reuseport", 0)),
            maximum_concurrent_rpcs=MAX_STREAMS,
        )
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(self._serve)
        self._server.add_registered_method_handlers(_SERVICE, {_NAME: handler})
        self.address = f"{host}:{self._server.add_insecure_port(f'{host}:0')}"
        self._server.start()

    def close(self) -> None:
        """Ends all streams and their threads. Idempotent."""
        stopped = self._server.stop(grace=None)
        with self._lock:
            self._closed = True
            sessions = list(self._sessions)
        for session in sessions:
            session.interrupt()
        stopped.wait()
        self._threads.shutdown()

    def _serve(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            with self._session(next(messages)) as session:
                yield session.reply()
                for message in messages:
                    session.take(message)
                    if session.owes_reply:
                        yield session.reply()
        except StopIteration:
            _refuse(context, TransferError("the stream does not begin with a hello"))
        except BatonError as error:
            _refuse(context, error)

    @contextlib.contextmanager
    def _session(self, hello: bytes) -> Iterator[Session]:
        with contextlib.closing(Session(self._receiver, hello, host=self._host)) as session:
            with self._lock:
                self._sessions.add(session)
                is_late = self._closed
            if is_late:
                session.interrupt()
            try:
                yield session
            finally:
                with self._lock:
                    self._sessions.remove(session)


def _refuse(context: grpc.ServicerContext, error: BatonError) -> NoReturn:
    context.abort(grpc.StatusCode[error.status], error.message)
