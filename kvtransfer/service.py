"""The KVTransfer service of a decode worker: Abort, on the worker's asyncio server."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from baton.internal.v1 import transfer_pb2, transfer_pb2_grpc
from kvtransfer.leading_receiver import LeadingReceiver


class KVTransferService(transfer_pb2_grpc.KVTransferServicer):
    """Never blocks the event loop."""

    def __init__(self, receiver: LeadingReceiver) -> None:
        self._receiver = receiver

    async def Abort(  # noqa: N802
        self, request: transfer_pb2.AbortRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> transfer_pb2.AbortResponse:
        # A worker of several ranks tells them all, through sockets that may be full while they compute.
        await asyncio.to_thread(self._receiver.abort, request)
        return transfer_pb2.AbortResponse()
