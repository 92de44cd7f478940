"""Counts HTTP calls around the whole application, and answers /metrics.

Plain ASGI: nothing is buffered, so streams pass as they are.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, make_asgi_app
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from baton.metrics import HttpMetrics

# What no route matches, whatever clients may ask for.
_OTHER = "other"


class MetricsEndpoint:
    """Serves a registry as Prometheus text, or as OpenMetrics where it is asked for, compressed where it may be.

    An object, since starlette takes a function for a handler of requests.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._app: ASGIApp = make_asgi_app(registry)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


class HttpMetricsMiddleware:
    """
    Args:
        app: the application.
        routes: its routes, for the label; whatever else is asked for shares one value.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: HttpMetrics,
        routes: Sequence[BaseRoute],
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._clock = clock
        paths = [(str(getattr(route, "path", "")), route) for route in routes]
        self._patterns = [(path, route) for path, route in paths if path]
        self._literal = {path for path, _ in self._patterns if "{" not in path}
        metrics.expect([path for path, _ in self._patterns])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_at = self._clock()
        # Now, since a mounted application changes the scope.
        route = self._route(scope)
        answer = _Answer(send)
        self._metrics.in_flight.inc()
        try:
            await self._app(scope, receive, answer.send)
        except (ClientDisconnect, asyncio.CancelledError):
            raise
        except Exception:
            answer.status = answer.status or 500
            answer.complete = True
            raise
        finally:
            self._metrics.in_flight.dec()
            self._metrics.requests.labels(route, str(answer.status if answer.complete else 499)).inc()
            self._metrics.duration_s.labels(route).observe(self._clock() - began_at)

    def _route(self, scope: Scope) -> str:
        path = scope["path"]
        if path in self._literal:
            return str(path)
        matching = (path for path, route in self._patterns if route.matches(scope)[0] is not Match.NONE)
        return next(matching, _OTHER)


class _Answer:
    """Passes an answer on and remembers how far it came."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 0
        self.complete = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.complete = True
