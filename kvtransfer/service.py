"""The KVTransfer service of a decode worker: Open, Commit and Abort, on the worker's asyncio server.

Nothing here blocks the event loop: a Commit that has to wait for frames is woken from the data plane's threads.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, NoReturn

import grpc

from baton.errors import BatonError
from baton.internal.v1 import transfer_pb2, transfer_pb2_grpc
from kvtransfer.receiver import Receiver


class KVTransferService(transfer_pb2_grpc.KVTransferServicer):
    """
    Args:
        timeout_s: longest time that a Commit waits for its frames.
    """

    def __init__(self, receiver: Receiver, timeout_s: float) -> None:
        self._receiver = receiver
        self._timeout_s = timeout_s

    async def Open(  # noqa: N802
        self, request: transfer_pb2.OpenRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> transfer_pb2.OpenResponse:
        try:
            self._receiver.open(request)
        except BatonError as error:
            await _refuse(context, error)
        return transfer_pb2.OpenResponse()

    async def Commit(  # noqa: N802
        self, request: transfer_pb2.CommitRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> transfer_pb2.CommitResponse:
        loop = asyncio.get_running_loop()
        answered = asyncio.Event()
        answers: list[BatonError | None] = []

        def answer(error: BatonError | None) -> None:
            answers.append(error)
            # The loop may have ended, and the caller with it.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(answered.set)

        try:
            self._receiver.commit(request, answer)
            try:
                async with asyncio.timeout(self._timeout_s):
                    await answered.wait()
            except TimeoutError:
                self._give_up(request, f"its frames did not arrive within {self._timeout_s:g} s of Commit")
                await answered.wait()
            except asyncio.CancelledError:
                self._give_up(request, "the sender gave up on Commit")
                raise
            if (error := answers[0]) is not None:
                raise error
        except BatonError as error:
            await _refuse(context, error)
        return transfer_pb2.CommitResponse()

    async def Abort(  # noqa: N802
        self, request: transfer_pb2.AbortRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> transfer_pb2.AbortResponse:
        self._receiver.abort(request)
        return transfer_pb2.AbortResponse()

    def _give_up(self, request: transfer_pb2.CommitRequest, reason: str) -> None:
        self._receiver.abort(transfer_pb2.AbortRequest(ref=request.ref, reservation=request.reservation, reason=reason))


async def _refuse(context: grpc.aio.ServicerContext[Any, Any], error: BatonError) -> NoReturn:
    await context.abort(grpc.StatusCode[error.status], error.message)
