"""The HTTP side: liveness, readiness and metrics, beside whatever API routes are added to it.

/health   200 while the process answers
/ready    200 while a request can be served, else 503
/metrics  Prometheus text
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route


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

    async def metrics(request: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return Starlette(routes=[Route("/health", health), Route("/ready", ready), Route("/metrics", metrics), *api_routes])


class HttpServer(uvicorn.Server):
    """Uvicorn in an event loop that is not its own: signals stay with the router."""

    def __init__(self, app: Starlette) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=1,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
