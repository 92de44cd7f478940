"""Tracing with OpenTelemetry, where the environment asks for it; else nothing of its SDK is loaded and nothing is done.

It is on where OTEL_TRACES_EXPORTER is `otlp` or `console`, or is not set and an OTLP endpoint is. All else is as the
standard variables say: OTEL_EXPORTER_OTLP_ENDPOINT, _PROTOCOL (`grpc`, the default, or `http/protobuf`), _HEADERS,
OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER, OTEL_BSP_*, OTEL_SDK_DISABLED.

A part of the program that makes spans holds a `Tracer | None`, so being off costs one comparison.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from baton.tracing.tracer import Tracer

# gRPC metadata, of which `traceparent` and `tracestate` are W3C's trace context.
Metadata = Sequence[tuple[str, str]]
AttributeValue = str | bool | int | float | Sequence[str]
Attributes = Mapping[str, AttributeValue]

Exporter = Literal["otlp", "console"]
Protocol = Literal["grpc", "http/protobuf"]

TRACEPARENT = "traceparent"


def open_tracer(role: str, instance: str, *, version: str, environ: Mapping[str, str] = os.environ) -> Tracer | None:
    """The tracer of this process; None where tracing is off.

    Args:
        role: router, prefill or decode; the service is baton-<role> unless OTEL_SERVICE_NAME says otherwise.
        instance: which of them this is.

    Raises:
        ValueError: a variable has a value that is not known.
    """
    exporter = exporter_of(environ)
    if exporter is None:
        return None
    protocol = protocol_of(environ)
    from baton.tracing.tracer import Tracer, make_exporter

    return Tracer(role, instance, make_exporter(exporter, protocol), version=version, environ=environ)


def exporter_of(environ: Mapping[str, str] = os.environ) -> Exporter | None:
    """What the environment wants spans sent by; None for off.

    Raises:
        ValueError: it names an exporter that is not known.
    """
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    wanted = environ.get("OTEL_TRACES_EXPORTER", "").strip()
    match wanted:
        case "otlp":
            return "otlp"
        case "console":
            return "console"
        case "none":
            return None
        case "":
            endpoints = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
            return "otlp" if any(environ.get(name) for name in endpoints) else None
    raise ValueError(f"OTEL_TRACES_EXPORTER {wanted}: must be otlp, console or none")


def protocol_of(environ: Mapping[str, str] = os.environ) -> Protocol:
    """How OTLP is spoken.

    Raises:
        ValueError: the environment names a protocol that is not known.
    """
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        match environ.get(name, "").strip():
            case "":
                continue
            case "grpc":
                return "grpc"
            case "http/protobuf":
                return "http/protobuf"
            case unknown:
                raise ValueError(f"{name} {unknown}: must be grpc or http/protobuf")
    return "grpc"


def trace_id(context: Metadata) -> str:
    """The trace that metadata names, in hexadecimal; empty where it names none."""
    for key, value in context:
        if key == TRACEPARENT:
            _, _, rest = value.partition("-")
            return rest.partition("-")[0]
    return ""
