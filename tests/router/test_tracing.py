"""What a trace tells of requests that do not go straight through; mock workers, and a collector on a real port."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import grpc
import pytest

from bench.mock_workers.cluster import MockCluster
from tests.collector import Collector, ReceivedSpan, grpc_collector
from tests.router.conftest import Client, StartRouter, next_of, request_of


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with grpc_collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        yield collector


@pytest.fixture
async def client(start_router: StartRouter, cluster: MockCluster, collector: Collector) -> AsyncIterator[Client]:
    async with start_router(cluster) as client:
        yield client


@pytest.fixture
async def cluster() -> AsyncIterator[MockCluster]:
    async with MockCluster() as cluster:
        yield cluster


async def spans_of(client: Client, collector: Collector) -> tuple[ReceivedSpan, list[tuple[str, int, str | None]]]:
    """The request's span; name, attempt and error of each stage's. The router has stopped, and so sent everything."""
    await client.server.stop()
    (root,) = [span for span in collector.spans if span.kind == 2]
    stages = [span for span in collector.spans if span.parent_id == root.span_id and span.name != "intake"]
    assert all(span.trace_id == root.trace_id for span in stages)
    return root, [(span.name, span.attributes["baton.attempt"], span.error) for span in stages]


async def test_a_retry_is_an_event_between_two_attempts(
    client: Client, cluster: MockCluster, collector: Collector
) -> None:
    cluster.prefill[0].failures = [(1, grpc.StatusCode.ABORTED)]
    await client.generate(request_of(max_tokens=3))
    root, stages = await spans_of(client, collector)
    assert root.error is None
    assert root.attributes["baton.attempts"] == 2
    assert root.events["baton.retry"].items() >= {"baton.attempt": 1, "baton.reason": "prefill_failed"}.items()
    message = root.events["baton.retry"]["baton.message"]
    assert stages[:3] == [("queue", 1, None), ("reserve", 1, None), ("prefill", 1, message)]
    assert [(name, attempt) for name, attempt, _ in stages[3:6]] == [("queue", 2), ("reserve", 2), ("prefill", 2)]
    assert all(error is None for _, _, error in stages[3:])


async def test_a_refusal_ends_the_reservation_alone(client: Client, cluster: MockCluster, collector: Collector) -> None:
    cluster.decode[0].refusals = 1
    await client.generate(request_of(max_tokens=3))
    root, stages = await spans_of(client, collector)
    assert root.events["baton.refusal"]["baton.reason"] == "refused"
    assert [name for name, _, _ in stages[:4]] == ["queue", "reserve", "queue", "reserve"]
    assert stages[1][2] is not None
    assert {attempt for _, attempt, _ in stages} == {1}


async def test_a_preemption_is_an_event(client: Client, cluster: MockCluster, collector: Collector) -> None:
    decode = cluster.decode[0]
    decode.step_gate.clear()
    call = client.stream(request_of(max_tokens=5))
    await next_of(call)
    await decode.until(lambda: decode.reservations)
    decode.preempt((0, 1))
    decode.step_gate.set()
    while await call.read() is not grpc.aio.EOF:
        pass
    root, stages = await spans_of(client, collector)
    assert root.events["baton.preemption"]["baton.reason"] == "preempted"
    assert {attempt for _, attempt, _ in stages} == {1, 2}


async def test_a_request_that_fails_has_its_status(client: Client, cluster: MockCluster, collector: Collector) -> None:
    cluster.prefill[0].failures = [(1, grpc.StatusCode.INTERNAL)]
    with pytest.raises(grpc.aio.AioRpcError):
        await client.generate(request_of(max_tokens=3))
    root, stages = await spans_of(client, collector)
    assert root.attributes["error.type"] == "INTERNAL"
    assert root.error is not None
    assert stages[-1] == ("prefill", 1, root.error)


async def test_what_the_client_did_wrong_is_no_error_of_the_server(client: Client, collector: Collector) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        await client.generate(request_of(max_tokens=3, temperature=-1.0))
    root, stages = await spans_of(client, collector)
    assert (root.attributes["error.type"], root.error, stages) == ("INVALID_ARGUMENT", None, [])


async def test_nor_is_what_only_a_worker_could_tell(client: Client, cluster: MockCluster, collector: Collector) -> None:
    """Its message may quote the request."""
    cluster.prefill[0].failures = [(1, grpc.StatusCode.INVALID_ARGUMENT)]
    with pytest.raises(grpc.aio.AioRpcError):
        await client.generate(request_of(max_tokens=3))
    root, stages = await spans_of(client, collector)
    assert (root.attributes["error.type"], root.error) == ("INVALID_ARGUMENT", None)
    assert stages
    assert [error for _, _, error in stages] == [None] * len(stages)


async def test_a_client_that_hangs_up_ends_every_span(
    client: Client, cluster: MockCluster, collector: Collector
) -> None:
    cluster.decode[0].step_gate.clear()
    call = client.stream(request_of(max_tokens=5))
    await next_of(call)
    call.cancel()
    await cluster.decode[0].until(lambda: cluster.decode[0].cancelled)
    root, stages = await spans_of(client, collector)
    assert (root.attributes["error.type"], root.error) == ("CANCELLED", None)
    assert root.attributes["gen_ai.usage.output_tokens"] == 1
    assert [error for _, _, error in stages] == [None] * len(stages)


async def test_logs_name_the_trace(
    client: Client, cluster: MockCluster, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.prefill[0].failures = [(1, grpc.StatusCode.ABORTED)]
    await client.generate(request_of(max_tokens=3, request_id="mine"))
    root, _ = await spans_of(client, collector)
    (record,) = [record for record in caplog.records if "trying again" in record.message]
    name = vars(record)["request"]
    assert (name.request_id, name.attempt, name.trace_id) == ("mine", 2, root.trace_id)
