"""The HTTP side: liveness, readiness and metrics, beside whatever API routes are added to it.

/health   200 while the process answers
/ready    200 while a request can be served, else 503
/version  the release of Baton
/metrics  Prometheus text, or OpenMetrics

Whatever else is asked for gets an error in OpenAI's shape.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import uvicorn
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

import baton
from router.batch import WriteBatch
from router.http_connection import HttpConnection
from router.http_metrics import MetricsEndpoint
from router.openai.errors import ApiError
from router.tls import ServerTls

# Above the minute after which load balancers drop idle connections: the end that opened one should close it.
_KEEP_ALIVE_S = 75
# The request line and all headers.
_MAX_HEADER_BYTES = 32 << 10


def create_app(
    *, is_ready: Callable[[], bool], registry: CollectorRegistry, api_routes: Sequence[BaseRoute] = ()
) -> Starlette:
    """The ASGI application.

    Args:
        api_routes: of APIs that serve requests, such as an OpenAI-compatible one.
    """

    async def health(request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def ready(request: Request) -> Response:
        return PlainTextResponse("ready\n") if is_ready() else PlainTextResponse("not ready\n", status_code=503)

    async def version(request: Request) -> Response:
        return JSONResponse({"version": baton.__version__})

    metrics = Route("/metrics", MetricsEndpoint(registry), methods=["GET"])
    app = Starlette(
        # In the order in which they are looked through: those of APIs are asked for most.
        routes=[*api_routes, Route("/health", health), Route("/ready", ready), Route("/version", version), metrics],
        exception_handlers={HTTPException: _no_route},
    )
    # A path with a slash too many is not found: a redirect would name the wrong scheme behind a proxy.
    app.router.redirect_slashes = False
    return app


async def _no_route(request: Request, error: Exception) -> Response:
    """Unknown paths, and methods that a path does not have; OPTIONS tells those that it has."""
    assert isinstance(error, HTTPException)
    path, method = request.url.path[:200], request.method
    if error.status_code == 404:
        return ApiError(404, f"there is no {path}").response()
    headers = dict(error.headers or {})
    if error.status_code == 405 and method == "OPTIONS":
        return Response(status_code=204, headers=headers)
    message = f"{method} is not allowed for {path}" if error.status_code == 405 else error.detail
    return ApiError(error.status_code, message, headers=headers).response()


class HttpServer(uvicorn.Server):
    """Uvicorn in an event loop that is not its own: signals stay with the router."""

    def __init__(self, app: ASGIApp, *, tls: ServerTls | None = None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                loop="none",
                # The faster parser, httptools, bounds neither the number of headers nor their size, and takes the offer
                # of an upgrade, which Java's client makes, for the end of a request: its body is lost.
                http=functools.partial(HttpConnection, WriteBatch()),  # type: ignore[arg-type]
                lifespan="off",
                ws="none",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=1,
                h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
                **(tls.uvicorn_options() if tls is not None else {}),
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
