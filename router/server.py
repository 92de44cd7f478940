"""Composes the router: makes every part, opens both ports, follows readiness, and drains.

Belongs to `router.__main__`, or to a test; everything runs on the event loop that calls it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
import uuid

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.types import ASGIApp

import baton
from baton.config import RouterProcessConfig, model_name
from baton.metrics import ClusterMetrics, GrpcMetrics, HttpMetrics, ProcessMetrics, RouterMetrics
from baton.tracing import open_tracer
from baton.v1 import inference_pb2
from router.accounting import Accounting, ClusterAccounting, Objectives
from router.admission import AdmissionQueue
from router.api_keys import ApiKeyInterceptor, ApiKeys
from router.app import SERVICE, InferenceService
from router.grammar import GrammarCheck
from router.grpc_metrics import GrpcMetricsInterceptor
from router.http import HttpServer, create_app
from router.http_metrics import HttpMetricsMiddleware
from router.intake import Intake
from router.ledger import Ledger
from router.membership import Membership
from router.model_card import read_model_card
from router.observation import Observer, Observers
from router.openai.api import OpenAIApi
from router.openai.chat_format import ChatFormat
from router.openai.served_model import ServedModel
from router.page.live_page import LivePage
from router.page.overview import NumRequests, Served
from router.pipeline import Pipeline, PipelineOptions
from router.placement import PlacementPolicy
from router.snapshot import ClusterSnapshot, WorkerKey
from router.targets import targets_route
from router.tls import ServerTls
from router.tokenization import Tokenizer
from router.tracing import RequestTraces, TraceInterceptor, TraceMiddleware
from router.worker_link import LinkOptions

_log = logging.getLogger(__name__)

# Cancelled calls get this long to release what they hold.
_STOP_GRACE_S = 1.0


class RouterServer:
    """One router.

    Attributes:
        grpc_address, http_address: host:port, known after `start`.
        pipeline: what APIs generate with.
        membership: the workers and the streams to them.
    """

    def __init__(self, config: RouterProcessConfig) -> None:
        """Reads the model's files; ValueError where they cannot serve. Must run on the event loop."""
        self._config = config
        router = config.router
        self._tls = ServerTls.from_config(router)
        self._api_keys = ApiKeys(router.api_keys)
        card = read_model_card(config.model.path, model_name(config.model))
        self._tokenizer = Tokenizer(config.model.path, card, num_threads=router.tokenizer_threads)
        self._registry = CollectorRegistry()
        ProcessMetrics(self._registry)
        self._workers = ClusterAccounting(ClusterMetrics(self._registry))
        router_id = f"router-{uuid.uuid4().hex[:12]}"
        self.membership = Membership(
            config.membership_address,
            LinkOptions(
                router_id=router_id,
                lease_s=config.transfer.lease_s,
                call_timeout_s=config.transfer.timeout_s,
                max_message_bytes=router.max_message_bytes,
                max_unacked_tokens=config.decode.max_unacked_tokens,
            ),
        )
        self._tracer = open_tracer("router", router_id, version=baton.__version__)
        accounting = Accounting(
            RouterMetrics(self._registry), Objectives(ttft_s=router.slo_ttft_s, tpot_s=router.slo_tpot_s)
        )
        self._queue = AdmissionQueue(
            Ledger(),
            PlacementPolicy(
                local_prefill_tokens=config.decode.local_prefill_tokens,
                backlog_prefill_tokens=config.decode.backlog_prefill_tokens,
                watermark=config.decode.watermark,
            ),
            max_queued=router.max_queued_requests,
            worker_wait_s=router.worker_wait_s,
            on_length=accounting.queued,
        )
        chat_format = ChatFormat.load(config.model.path, card, router)
        self._page = LivePage(
            served=Served(model=card.name, chat=chat_format.has_template),
            membership=self.membership,
            num_requests=self._num_requests,
            is_ready=lambda: self.ready,
            clock=time.monotonic,
        )
        self._grammars = GrammarCheck()
        intake = Intake(card, self._tokenizer, self.membership, router, self._grammars)
        self.pipeline = Pipeline(
            intake=intake,
            queue=self._queue,
            membership=self.membership,
            observer=Observers(accounting, *self._page.observers, *self._traces(card.name)),
            detokenizer=self._tokenizer.detokenizer,
            options=PipelineOptions(
                router_id=router_id,
                max_retries=router.max_retries,
                max_unacked_tokens=config.decode.max_unacked_tokens,
            ),
            clock=time.monotonic,
        )
        self._service = InferenceService(
            pipeline=self.pipeline,
            intake=intake,
            tokenizer=self._tokenizer,
            membership=self.membership,
            card=card,
            config=router,
        )
        self._openai = OpenAIApi(
            pipeline=self.pipeline,
            tokenizer=self._tokenizer,
            model=ServedModel(card, self.membership),
            chat_format=chat_format,
            keys=self._api_keys,
            config=router,
        )
        self._health = health.aio.HealthServicer()
        self._grpc = self._make_grpc_server()
        app = self._make_http_app(card.name)
        asgi: ASGIApp = HttpMetricsMiddleware(app, HttpMetrics(self._registry), app.routes)
        if self._tracer is not None:
            asgi = TraceMiddleware(asgi, time.monotonic)
        self._http = HttpServer(asgi, tls=self._tls)
        self._listener: socket.socket | None = None
        self._http_task: asyncio.Task[None] | None = None
        self._health_task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._was_ready = asyncio.Event()
        self._draining = False
        self.grpc_address = ""
        self.http_address = ""

    @property
    def ready(self) -> bool:
        """Whether a request can be served now."""
        return self.membership.snapshot.ready and not self._draining

    @property
    def url(self) -> str:
        """The HTTP port's address, with its scheme."""
        return f"{'http' if self._tls is None else 'https'}://{self.http_address}"

    async def wait_ready(self) -> None:
        """Returns when a request could be served for the first time."""
        await self._was_ready.wait()

    async def start(self) -> None:
        """Opens both ports and begins to follow the cluster; OSError where a port is taken."""
        router = self._config.router
        self._listener = socket.create_server((router.host, router.http_port))
        self.http_address = f"{router.host}:{self._listener.getsockname()[1]}"
        self.grpc_address = f"{router.host}:{self._listen(router.host, router.grpc_port)}"
        self.membership.subscribe(self._queue.update)
        self.membership.subscribe(self._workers.changed)
        self.membership.subscribe(self._cluster_changed)
        self.membership.start()
        self._health_task = asyncio.create_task(self._follow_readiness())
        await self._grpc.start()
        self._http_task = asyncio.create_task(self._http.serve(sockets=[self._listener]))

    async def drain(self, timeout_s: float) -> None:
        """Refuses new requests; returns when the running ones have ended, or after `timeout_s`."""
        self._draining = True
        await self._health.enter_graceful_shutdown()
        try:
            async with asyncio.timeout(timeout_s):
                await self.pipeline.drain()
        except TimeoutError:
            _log.warning("%d requests were still running after %g s", self.pipeline.num_running, timeout_s)

    async def stop(self) -> None:
        """Cancels what still runs and closes everything."""
        self._queue.close()
        await self._grpc.stop(_STOP_GRACE_S)
        self._page.close()
        self._http.should_exit = True
        if self._http_task is not None:
            await self._http_task
        if self._listener is not None:
            self._listener.close()
        if self._health_task is not None:
            self._health_task.cancel()
            await asyncio.gather(self._health_task, return_exceptions=True)
        await self.membership.close()
        self._tokenizer.close()
        self._grammars.close()
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)

    def _traces(self, model: str) -> list[Observer]:
        """What follows requests for tracing, where it is on."""
        return [] if self._tracer is None else [RequestTraces(self._tracer, model=model, clock=time.monotonic)]

    def _make_http_app(self, model: str) -> Starlette:
        targets = targets_route(
            snapshot=lambda: self.membership.snapshot, listens_on=lambda: self.http_address, model=model
        )
        return create_app(
            is_ready=lambda: self.ready,
            registry=self._registry,
            api_routes=[*self._openai.routes, targets, *self._page.routes],
        )

    def _make_grpc_server(self) -> grpc.aio.Server:
        max_bytes = self._config.router.max_message_bytes
        methods = inference_pb2.DESCRIPTOR.services_by_name["Inference"].methods
        counted = frozenset(f"/{SERVICE}/{method.name}" for method in methods)
        server = grpc.aio.server(
            interceptors=[
                *([] if self._tracer is None else [TraceInterceptor(time.monotonic)]),
                GrpcMetricsInterceptor(GrpcMetrics(self._registry), counted),
                ApiKeyInterceptor(self._api_keys),
            ],
            options=[
                ("grpc.max_receive_message_length", max_bytes),
                ("grpc.max_send_message_length", max_bytes),
                # Two routers on one port would share its requests unnoticed.
                ("grpc.so_reuseport", 0),
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
                ("grpc.keepalive_permit_without_calls", 1),
            ],
        )
        self._service.add_to(server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        return server

    def _listen(self, host: str, port: int) -> int:
        try:
            if self._tls is not None:
                return self._grpc.add_secure_port(f"{host}:{port}", self._tls.grpc_credentials())
            return self._grpc.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise OSError(f"cannot listen on {host}:{port}: {error}") from error

    def _num_requests(self) -> NumRequests:
        queued = self.pipeline.num_queued
        return NumRequests(queued=queued, running=self.pipeline.num_running - queued)

    def _cluster_changed(self, snapshot: ClusterSnapshot, key: WorkerKey | None) -> None:
        self._changed.set()

    async def _follow_readiness(self) -> None:
        """Keeps grpc.health.v1 in step with `ready`."""
        told: bool | None = None
        while True:
            self._changed.clear()
            # Asked after every state of a worker, and rarely another answer.
            if (ready := self.ready) is not told:
                told = ready
                status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
                for service in (SERVICE, health.OVERALL_HEALTH):
                    await self._health.set(service, status)
                if ready:
                    self._was_ready.set()
            await self._changed.wait()
