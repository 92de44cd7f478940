"""Counts the calls of one gRPC service, as an interceptor of the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from baton.metrics import GrpcMetrics

_Context = grpc.aio.ServicerContext[Any, Any]
_Method = Callable[[Any, _Context], Awaitable[Any]]


class GrpcMetricsInterceptor(grpc.aio.ServerInterceptor):
    """
    Args:
        methods: "/package.Service/Method" of all that are counted; they take one message and are coroutines.
        clock: monotonic seconds.
    """

    def __init__(
        self, metrics: GrpcMetrics, methods: frozenset[str], *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._metrics = metrics
        self._methods = methods
        self._clock = clock
        metrics.expect(sorted(methods))

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method not in self._methods:
            return handler
        assert not handler.request_streaming, "a counted method takes one message"
        if handler.response_streaming:
            make, behaviour = grpc.unary_stream_rpc_method_handler, handler.unary_stream
        else:
            make, behaviour = grpc.unary_unary_rpc_method_handler, handler.unary_unary
        counted = self._counted(behaviour, method)  # type: ignore[arg-type]
        return make(
            counted,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _counted(self, behaviour: _Method, method: str) -> _Method:
        async def call(request: Any, context: _Context) -> Any:
            began_at = self._clock()
            self._metrics.in_flight.inc()
            status = "unknown"
            try:
                answer = await behaviour(request, context)
                status = "ok"
                return answer
            except asyncio.CancelledError:
                status = "cancelled"
                raise
            except grpc.aio.AbortError:
                status = context.code().name.lower()
                raise
            finally:
                self._metrics.in_flight.dec()
                self._metrics.calls.labels(method, status).inc()
                self._metrics.duration_s.labels(method).observe(self._clock() - began_at)

        return call
