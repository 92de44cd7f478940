"""The tracer of a process that is traced: the only module that loads OpenTelemetry's SDK.

Times are in monotonic seconds, as the rest of the program counts them. Spans never hold prompts or what was generated.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from typing import Literal

from opentelemetry import trace
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from baton.tracing import Attributes, Exporter, Metadata, Protocol

# A collector that does not answer holds up the end of a process for no longer than this.
CLOSE_TIMEOUT_S = 3.0

_KINDS = {"server": trace.SpanKind.SERVER, "internal": trace.SpanKind.INTERNAL}
_PROPAGATOR = TraceContextTextMapPropagator()


class Tracer:
    """Makes spans and exports them in the background. Any thread may call.

    Args:
        environ: the standard variables; samplers and exporters read the process's own.
    """

    def __init__(
        self,
        role: str,
        instance: str,
        exporter: SpanExporter,
        *,
        version: str,
        environ: Mapping[str, str],
    ) -> None:
        attributes = {"service.instance.id": instance, "service.version": version, "baton.role": role}
        if not _names_service(environ):
            attributes[SERVICE_NAME] = f"baton-{role}"
        # The end of a process is ours: the SDK's own hook waits as long as its exporter likes.
        self._provider = TracerProvider(resource=Resource.create(attributes), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("baton", version)

    def start(
        self,
        name: str,
        *,
        start_s: float,
        attributes: Attributes,
        context: Metadata = (),
        kind: Literal["server", "internal"] = "server",
    ) -> Span:
        """Begins a span, in the trace that `context` names or in a new one. It must be ended."""
        carrier = {key: value for key, value in context if isinstance(value, str)}
        clock_ns = time.time_ns() - time.monotonic_ns()
        span = self._tracer.start_span(
            name,
            context=_PROPAGATOR.extract(carrier),
            kind=_KINDS[kind],
            attributes=attributes,
            start_time=clock_ns + int(start_s * 1e9),
        )
        return Span(self._tracer, span, clock_ns)

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Sends what has ended, for at most `timeout_s`, and makes no more spans. Idempotent."""
        closing = threading.Thread(target=self._provider.shutdown, name="tracing-shutdown", daemon=True)
        closing.start()
        closing.join(timeout_s)


class Span:
    """One span under way, and what is known to have happened under it.

    Attributes:
        context: metadata that lets another process join.
    """

    def __init__(self, tracer: trace.Tracer, span: trace.Span, clock_ns: int) -> None:
        self._tracer = tracer
        self._span = span
        self._clock_ns = clock_ns
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, trace.set_span_in_context(span))
        self.context: tuple[tuple[str, str], ...] = tuple(carrier.items())

    def set(self, attributes: Attributes) -> None:
        self._span.set_attributes(attributes)

    def event(self, name: str, at_s: float, attributes: Attributes) -> None:
        """Something that happened at one moment."""
        self._span.add_event(name, attributes, self._ns(at_s))

    def child(
        self, name: str, start_s: float, end_s: float, attributes: Attributes, *, error: str | None = None
    ) -> None:
        """A part of it that is over; `error` says why it failed, if it did."""
        if not self._span.is_recording():
            return
        child = self._tracer.start_span(
            name,
            context=trace.set_span_in_context(self._span),
            attributes=attributes,
            start_time=self._ns(start_s),
        )
        if error is not None:
            child.set_status(trace.StatusCode.ERROR, error)
        child.end(self._ns(max(end_s, start_s)))

    def end(self, end_s: float, *, error: str | None = None) -> None:
        """It is over; `error` says why it failed, if it did."""
        if error is not None:
            self._span.set_status(trace.StatusCode.ERROR, error)
        self._span.end(self._ns(end_s))

    def _ns(self, moment_s: float) -> int:
        return self._clock_ns + int(moment_s * 1e9)


def _names_service(environ: Mapping[str, str]) -> bool:
    pairs = environ.get("OTEL_RESOURCE_ATTRIBUTES", "").split(",")
    return bool(environ.get("OTEL_SERVICE_NAME")) or any(pair.strip().startswith("service.name=") for pair in pairs)


def make_exporter(exporter: Exporter, protocol: Protocol) -> SpanExporter:
    """What sends spans; reads its own variables."""
    if exporter == "console":
        # Stdout belongs to the processes' own protocol.
        return ConsoleSpanExporter(out=sys.stderr, formatter=_one_line)
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

        return HttpExporter()
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

    return GrpcExporter()


def _one_line(span: ReadableSpan) -> str:
    return f"{span.to_json(indent=None)}\n"
