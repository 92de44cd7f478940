"""When tracing is on, what it costs when it is off, and what a tracer sends."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

import pytest

from baton import tracing
from baton.tracing.tracer import Tracer
from tests.collector import grpc_collector

REMOTE = ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317"}


@pytest.mark.parametrize(
    ("environ", "exporter"),
    [
        ({}, None),
        (ENDPOINT, "otlp"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4317"}, "otlp"),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, "otlp"),
        ({"OTEL_TRACES_EXPORTER": "console"}, "console"),
        ({**ENDPOINT, "OTEL_TRACES_EXPORTER": "none"}, None),
        ({**ENDPOINT, "OTEL_SDK_DISABLED": "TRUE"}, None),
    ],
)
def test_the_environment_turns_it_on(environ: dict[str, str], exporter: str | None) -> None:
    assert tracing.exporter_of(environ) == exporter


@pytest.mark.parametrize(
    ("environ", "protocol"),
    [
        ({}, "grpc"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, "http/protobuf"),
        (
            {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc"},
            "grpc",
        ),
    ],
)
def test_the_protocol_for_traces_goes_before_the_general_one(environ: dict[str, str], protocol: str) -> None:
    assert tracing.protocol_of(environ) == protocol


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER zipkin: must be otlp, console or none"),
        (
            {**ENDPOINT, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"},
            "OTEL_EXPORTER_OTLP_PROTOCOL http/json: must be grpc or http/protobuf",
        ),
    ],
)
def test_what_is_not_known_is_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tracing.open_tracer("router", "r-1", version="1", environ=environ)


def test_off_loads_nothing_of_opentelemetry() -> None:
    code = (
        "import sys, router.server, prefill_worker.tracing, decode_worker.tracing, worker.host, baton.tracing as t;"
        "assert t.open_tracer('router', 'r-1', version='1', environ={}) is None;"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_a_span_joins_the_trace_it_is_given_and_has_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    with grpc_collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        tracer = tracing.open_tracer("prefill", "prefill-0/1", version="1")
        assert isinstance(tracer, Tracer)
        span = tracer.start("attempt", start_s=10.0, attributes={"n": 1}, context=[REMOTE, ("other", "x")])
        span.child("queue", 10.0, 10.5, {})
        span.child("compute", 10.5, 11.0, {}, error="out of memory")
        span.event("baton.retry", 10.7, {"reason": "why"})
        span.end(12.0)
        tracer.close()
        queue, compute, attempt = sorted(collector.spans, key=lambda span: span.end_ns)
    assert tracing.trace_id(span.context) == attempt.trace_id == REMOTE[1].split("-")[1]
    assert (attempt.service, attempt.instance, attempt.parent_id) == (
        "baton-prefill",
        "prefill-0/1",
        REMOTE[1].split("-")[2],
    )
    assert queue.parent_id == compute.parent_id == attempt.span_id
    assert [(part.end_ns - part.start_ns) // 1_000_000 for part in (queue, compute, attempt)] == [500, 500, 2000]
    assert (queue.error, compute.error) == (None, "out of memory")
    assert attempt.events == {"baton.retry": {"reason": "why"}}


@pytest.mark.parametrize(
    "variable", [("OTEL_SERVICE_NAME", "mine"), ("OTEL_RESOURCE_ATTRIBUTES", "zone=a, service.name=mine")]
)
def test_the_environment_names_the_service(monkeypatch: pytest.MonkeyPatch, variable: tuple[str, str]) -> None:
    monkeypatch.setenv(*variable)
    with grpc_collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        tracer = tracing.open_tracer("decode", "decode-0/1", version="1")
        assert tracer is not None
        tracer.start("attempt", start_s=0, attributes={}).end(1)
        tracer.close()
        assert [span.service for span in collector.spans] == ["mine"]


def test_a_client_that_does_not_sample_is_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    with grpc_collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        tracer = tracing.open_tracer("router", "r-1", version="1")
        assert tracer is not None
        unsampled = ("traceparent", REMOTE[1].removesuffix("01") + "00")
        span = tracer.start("chat demo", start_s=0, attributes={}, context=[unsampled])
        span.child("queue", 0, 1, {})
        span.end(1)
        tracer.close()
        assert collector.spans == []
    # Workers follow suit.
    assert dict(span.context)["traceparent"].endswith("-00")


def test_a_collector_that_never_answers_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "3600")
        tracer = tracing.open_tracer("router", "r-1", version="1")
        assert tracer is not None
        tracer.start("chat demo", start_s=time.monotonic(), attributes={}).end(time.monotonic())
        # Returns, though an export may take an hour.
        tracer.close(timeout_s=0.1)
