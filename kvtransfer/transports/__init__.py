"""The transports table. A new one is a module here, a row below, and an entry of `TransferConfig.transports`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from baton.internal.v1 import transfer_pb2

if TYPE_CHECKING:
    from kvtransfer.transports.base import Transport

TRANSPORTS = {
    "loopback": "kvtransfer.transports.loopback:LoopbackTransport",
    "cuda_ipc": "kvtransfer.transports.cuda_ipc:CudaIpcTransport",
    "shm": "kvtransfer.transports.shm:ShmTransport",
    "collective": "kvtransfer.transports.collective:CollectiveTransport",
    "grpc": "kvtransfer.transports.grpc:GrpcTransport",
}


def load(name: str) -> Transport:
    """The transport of a row of the table."""
    module, _, class_name = TRANSPORTS[name].partition(":")
    transport: Transport = getattr(importlib.import_module(module), class_name)()
    return transport


def choose(
    preferred: Sequence[Transport], offers: Sequence[transfer_pb2.TransportOffer]
) -> list[tuple[Transport, transfer_pb2.TransportOffer]]:
    """The ways that both sides can go, in the order of `preferred`."""
    by_name = {offer.transport: offer for offer in offers}
    return [
        (transport, by_name[transport.name])
        for transport in preferred
        if transport.name in by_name and transport.reaches(by_name[transport.name])
    ]
