"""API keys: who may call the router, where keys are configured. Both APIs ask here."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NoReturn

import grpc
import grpc.aio

from baton.errors import UnauthenticatedError

_HEADER = "authorization"
_PROBLEM = "authorization: a valid API key is required, as Bearer KEY"
# Probes and tools carry no key; neither service tells anything of requests.
_OPEN_SERVICES = ("/grpc.health.v1.", "/grpc.reflection.")

# By whether requests, and whether responses, are streams.
_MAKERS: Mapping[tuple[bool, bool], Callable[..., grpc.RpcMethodHandler[Any, Any]]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


class ApiKeys:
    """The keys that are valid. They are held as digests, so that comparing takes the same time for every wrong key."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    @property
    def required(self) -> bool:
        """Whether calls need a key at all."""
        return bool(self._digests)

    def check(self, authorization: str | None) -> None:
        """Checks the value of an `Authorization` header, None where there is none.

        Raises:
            UnauthenticatedError: a key is required, and this is none. The message holds nothing of what was sent.
        """
        if not self.required:
            return
        scheme, _, key = (authorization or "").partition(" ")
        digest = _digest(key.strip())
        # All are compared, so that the time does not tell which one is like it.
        matches = [hmac.compare_digest(digest, valid) for valid in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise UnauthenticatedError(_PROBLEM)


class ApiKeyInterceptor(grpc.aio.ServerInterceptor):
    """Ends gRPC calls without a valid key with UNAUTHENTICATED before the service sees them."""

    def __init__(self, keys: ApiKeys) -> None:
        self._keys = keys

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(_OPEN_SERVICES):
            return handler
        metadata = dict(handler_call_details.invocation_metadata or ())
        try:
            self._keys.check(_text(metadata.get(_HEADER)))
        except UnauthenticatedError as error:
            return _refusing(error.message, handler)
        return handler


def _refusing(message: str, handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler of the same shape that only refuses; what was sent stays bytes that nobody parses."""

    async def refuse(request: object, context: grpc.aio.ServicerContext[Any, Any]) -> NoReturn:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, message)

    return _MAKERS[handler.request_streaming, handler.response_streaming](refuse, None, handler.response_serializer)


def _text(value: str | bytes | None) -> str | None:
    return value.decode("ascii", "replace") if isinstance(value, bytes) else value


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
