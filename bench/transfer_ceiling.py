"""What gRPC alone makes between two processes of this host: one stream of raw bytes, nothing done with them.

The limit of the `grpc` transport: same messages, same channel options, each answered, as many under way, and each
process on half of the cores.
"""

from __future__ import annotations

import multiprocessing
import queue
import statistics
import time
from collections.abc import Iterator
from concurrent import futures
from multiprocessing.connection import Connection

import grpc

from baton.config import TransferConfig
from bench.cores import halves, on_cores
from kvtransfer.channel import stream_options
from kvtransfer.data_server import max_message_bytes
from kvtransfer.heap import keep_freed_memory

_SERVICE, _NAME = "baton.bench.Bare", "Stream"


def grpc_bandwidth(num_bytes: int, rounds: int) -> float:
    """Bytes per second of messages that make up `num_bytes`, the median of some rounds after one more."""
    config = TransferConfig()
    message_bytes = min(config.frame_bytes, num_bytes)
    messages = [bytes(message_bytes) for _ in range(num_bytes // message_bytes)]
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(target=_serve, args=(there, message_bytes), daemon=True)
    our_cores, their_cores = halves()
    with on_cores(our_cores):
        with on_cores(their_cores):
            server.start()
        there.close()
        try:
            keep_freed_memory()
            options = stream_options(max_message_bytes(message_bytes))
            with grpc.insecure_channel(here.recv(), options=options) as channel:
                outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
                stream: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(f"/{_SERVICE}/{_NAME}")
                replies = stream(iter(outbox.get, None))
                window = max(2, config.ring_bytes // message_bytes)
                seconds = [_send(messages, outbox, replies, window) for _ in range(rounds + 1)]
                outbox.put(None)
            here.send(None)
            server.join()
        finally:
            if server.is_alive():
                server.terminate()
                server.join()
    return len(messages) * message_bytes / statistics.median(seconds[1:])


def _send(
    messages: list[bytes], outbox: queue.SimpleQueue[bytes | None], replies: Iterator[bytes], window: int
) -> float:
    """Seconds from the first message to the last reply, with `window` of them under way."""
    started_s = time.perf_counter()
    for index, message in enumerate(messages):
        if index >= window:
            next(replies)
        outbox.put(message)
    for _ in range(min(window, len(messages))):
        next(replies)
    return time.perf_counter() - started_s


def _serve(pipe: Connection, message_bytes: int) -> None:
    """The server's process, until told to end."""
    keep_freed_memory()
    threads = futures.ThreadPoolExecutor(1)
    server = grpc.server(threads, options=stream_options(max_message_bytes(message_bytes)))
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(_answer)
    server.add_registered_method_handlers(_SERVICE, {_NAME: handler})
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    pipe.send(f"127.0.0.1:{port}")
    pipe.recv()
    server.stop(grace=None).wait()
    threads.shutdown()


def _answer(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    for _ in messages:
        yield b"."
