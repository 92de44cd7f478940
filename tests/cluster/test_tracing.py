"""One trace over router, prefill and decode worker, as a collector receives it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import urllib.request
from collections.abc import Iterator

import grpc
import pytest

from baton.client import Client
from baton.v1 import inference_pb2, inference_pb2_grpc
from deploy.tour import MODEL
from tests.cluster.inprocess import InProcessCluster
from tests.collector import Collector, ReceivedSpan, grpc_collector, http_collector

TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{CALLER}-01"
STAGES = ("queue", "reserve", "prefill", "transfer", "first_decode_step", "decode")
INTERNAL, SERVER = 1, 2
PROMPT = "The secret word of the day is heliotrope; say nothing about it to anybody, whoever asks."


@contextlib.contextmanager
def traced_cluster(collector: Collector, monkeypatch: pytest.MonkeyPatch, protocol: str) -> Iterator[InProcessCluster]:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    cluster = InProcessCluster(MODEL)
    cluster.start()
    try:
        yield cluster
    finally:
        cluster.stop()


def generate(target: str, **fields: object) -> list[inference_pb2.GenerateResponse]:
    with grpc.insecure_channel(target) as channel:
        request = inference_pb2.GenerateRequest(text=PROMPT, **fields)  # type: ignore[arg-type]
        stub = inference_pb2_grpc.InferenceStub(channel)
        return list(stub.Generate(request, metadata=(("traceparent", TRACEPARENT),)))


@dataclasses.dataclass(frozen=True)
class Trace:
    """What a collector received of one request, and the answer to it."""

    spans: list[ReceivedSpan]
    answer: list[inference_pb2.GenerateResponse]

    @property
    def root(self) -> ReceivedSpan:
        (root,) = [span for span in self.spans if span.parent_id == CALLER]
        return root

    def under(self, parent: ReceivedSpan, kind: int = INTERNAL) -> dict[str, ReceivedSpan]:
        """By name, in the order of their start."""
        return {span.name: span for span in self.spans if span.parent_id == parent.span_id and span.kind == kind}


@pytest.fixture(scope="module")
def trace() -> Iterator[Trace]:
    with grpc_collector() as collector, pytest.MonkeyPatch.context() as monkeypatch:
        with traced_cluster(collector, monkeypatch, "grpc") as cluster:
            sampling = inference_pb2.SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
            answer = generate(cluster.target, request_id="mine", sampling=sampling)
        yield Trace(collector.spans, answer)


def test_a_request_is_one_trace_over_all_three_processes(trace: Trace) -> None:
    assert {span.trace_id for span in trace.spans} == {TRACE}
    assert {span.service for span in trace.spans} == {"baton-router", "baton-prefill", "baton-decode"}
    attempts = trace.under(trace.root, SERVER)
    assert {name: span.instance for name, span in attempts.items()} == {
        "prefill attempt": "prefill-0/1",
        "decode attempt": "decode-0/2",
    }
    names = {span.attributes["baton.request_id"] for span in (trace.root, *attempts.values())}
    assert len(names) == 1


def test_the_requests_span_speaks_the_genai_conventions(trace: Trace) -> None:
    root, usage = trace.root, trace.answer[-1].usage
    assert (root.service, root.kind, root.error) == ("baton-router", SERVER, None)
    assert root.name == f"text_completion {MODEL.name}"
    expected = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "baton",
        "gen_ai.request.model": MODEL.name,
        "gen_ai.request.max_tokens": 16,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": 16,
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.response.id": "mine",
        "baton.attempts": 1,
    }
    assert {name: root.attributes.get(name) for name in expected} == expected
    assert 0 < root.attributes["gen_ai.response.time_to_first_chunk"] < (root.end_ns - root.start_ns) / 1e9


def test_the_routers_stages_follow_each_other(trace: Trace) -> None:
    stages = trace.under(trace.root)
    # A router that is late may hear of the last stages all at once.
    assert list(stages) == ["intake", *STAGES][: len(stages)]
    assert len(stages) >= 4
    for earlier, later in itertools.pairwise(stages.values()):
        assert trace.root.start_ns <= earlier.start_ns <= earlier.end_ns <= later.start_ns + 1000
    assert stages["reserve"].attributes == {"baton.attempt": 1, "baton.worker": "decode-0"}
    assert stages["prefill"].attributes["baton.worker"] == "prefill-0"


def test_workers_tell_what_they_did(trace: Trace) -> None:
    attempts = trace.under(trace.root, SERVER)
    prefill = trace.under(attempts["prefill attempt"])
    assert list(prefill) == ["queue", "compute", "push"]
    assert prefill["push"].attributes["baton.transfer.transport"] == "shm"
    assert list(trace.under(attempts["decode attempt"])) == ["receive", "decode"]
    assert attempts["decode attempt"].attributes["baton.outcome"] == "finished"


def test_neither_prompt_nor_answer_is_in_a_span(trace: Trace) -> None:
    text = "".join(choice.text for response in trace.answer for choice in response.choices)
    assert text
    assert "heliotrope" not in repr(trace.spans)
    assert repr(text).strip("'") not in repr(trace.spans)


def test_http_carries_the_context_and_failures_have_a_type(monkeypatch: pytest.MonkeyPatch) -> None:
    with http_collector() as collector:
        with traced_cluster(collector, monkeypatch, "http/protobuf") as cluster:
            body = {"model": MODEL.name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
            request = urllib.request.Request(
                f"{cluster.http}/v1/chat/completions",
                json.dumps(body).encode(),
                {"content-type": "application/json", "traceparent": TRACEPARENT},
            )
            urllib.request.urlopen(request).close()
            with pytest.raises(grpc.RpcError):
                generate(cluster.target, model="another")
            with Client(cluster.target) as client:
                stream = client.stream(PROMPT, max_tokens=500, ignore_eos=True)
                next(stream)
                stream.close()
        spans = collector.spans
    roots = {
        span.attributes.get("error.type", "OK"): span
        for span in spans
        if span.kind == SERVER and span.service == "baton-router"
    }
    assert set(roots) == {"OK", "NOT_FOUND", "CANCELLED"}
    assert (roots["OK"].name, roots["OK"].parent_id) == (f"chat {MODEL.name}", CALLER)
    assert roots["NOT_FOUND"].error is None
    assert roots["CANCELLED"].parent_id == ""
    abandoned = [span for span in spans if span.trace_id == roots["CANCELLED"].trace_id]
    assert {span.attributes.get("baton.outcome") for span in abandoned if span.name == "decode attempt"} == {"released"}
