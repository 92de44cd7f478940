"""Calls a gRPC server as grpcurl and graphical clients do: with nothing but the channel, by reflection."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import grpc
from google.protobuf import descriptor_pool, json_format, message_factory
from google.protobuf.message import Message
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase


class ReflectedServer:
    """What the server says of itself, and calls made from that."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._database = ProtoReflectionDescriptorDatabase(channel)
        self._pool = descriptor_pool.DescriptorPool(self._database)

    def services(self) -> set[str]:
        """Full names of all services."""
        return set(self._database.get_services())

    def methods(self, service: str) -> set[str]:
        """Names of a service's methods."""
        return {method.name for method in self._pool.FindServiceByName(service).methods}

    def knows(self, symbol: str) -> bool:
        """Whether a service or message of this full name is described."""
        return self._pool.FindFileContainingSymbol(symbol) is not None

    def call(
        self, path: str, request: str, *, metadata: Sequence[tuple[str, str]] = (), timeout_s: float = 30.0
    ) -> list[Message]:
        """The answers to a request in JSON; `path` is package.Service/Method."""
        service, _, name = path.rpartition("/")
        method: Any = self._pool.FindServiceByName(service).methods_by_name[name]
        message = json_format.Parse(request, message_factory.GetMessageClass(method.input_type)())
        make: Any = self._channel.unary_stream if method.server_streaming else self._channel.unary_unary
        call = make(
            f"/{path}",
            request_serializer=type(message).SerializeToString,
            response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
        )
        answer: Message | Iterable[Message] = call(message, timeout=timeout_s, metadata=tuple(metadata))
        return [answer] if isinstance(answer, Message) else list(answer)
