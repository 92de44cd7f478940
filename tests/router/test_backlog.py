"""Prompts that decode workers take over from busy prefill workers, against mock workers over real sockets."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Sequence

from baton.v1 import inference_pb2
from bench.mock_workers.cluster import MockCluster
from tests.router.conftest import Client, StartRouter, request_of, tokens_of

Call = asyncio.Task[list[inference_pb2.GenerateResponse]]


def start(client: Client, lengths: Sequence[int]) -> list[Call]:
    return [asyncio.create_task(client.generate(request_of([7] * length, max_tokens=4))) for length in lengths]


async def ended(calls: Sequence[Call]) -> list[bool]:
    """Whether each was prefilled by the decode worker; all have their tokens."""
    responses = await asyncio.gather(*calls)
    assert [tokens_of(each) for each in responses] == [[40, 41, 42, 43]] * len(calls)
    return [each[-1].timings.local_prefill for each in responses]


def close_gates(cluster: MockCluster) -> None:
    """Prompts arrive and none is computed."""
    cluster.prefill[0].first_gate.clear()
    cluster.decode[0].step_gate.clear()


def open_gates(cluster: MockCluster) -> None:
    cluster.prefill[0].first_gate.set()
    cluster.decode[0].step_gate.set()


async def test_a_burst_of_short_prompts_is_shared_out(start_router: StartRouter) -> None:
    async with (
        MockCluster(total_blocks=1024) as cluster,
        start_router(cluster, decode={"backlog_prefill_tokens": 100}) as client,
    ):
        close_gates(cluster)
        calls = start(client, [96] * 12)
        await cluster.decode[0].until(lambda: len(cluster.decode[0].reserves) == 12)
        open_gates(cluster)
        assert collections.Counter(await ended(calls)) == {False: 9, True: 3}
        assert len(cluster.prefill[0].requests) == 9


async def test_long_prompts_wait_however_long_the_backlog_is(start_router: StartRouter) -> None:
    async with (
        MockCluster(total_blocks=1024) as cluster,
        start_router(cluster, decode={"backlog_prefill_tokens": 100}) as client,
    ):
        close_gates(cluster)
        long = start(client, [101] * 12)
        await cluster.prefill[0].until(lambda: len(cluster.prefill[0].requests) == 12)
        short = start(client, [100])
        await cluster.decode[0].until(lambda: len(cluster.decode[0].reserves) == 13)
        open_gates(cluster)
        assert await ended(long) == [False] * 12
        assert await ended(short) == [True]


async def test_without_a_backlog_short_prompts_go_to_the_prefill_worker(start_router: StartRouter) -> None:
    async with MockCluster() as cluster, start_router(cluster, decode={"backlog_prefill_tokens": 100}) as client:
        for _ in range(3):
            assert await ended(start(client, [96])) == [False]


async def test_the_queues_that_workers_report_count(start_router: StartRouter) -> None:
    """They hold what other routers have placed."""
    async with MockCluster() as cluster, start_router(cluster, decode={"backlog_prefill_tokens": 100}) as client:
        cluster.prefill[0].publish(queued_tokens=500, waiting=5)
        await client.until_status(lambda status: [worker.waiting for worker in status.workers] == [5, 0])
        assert await ended(start(client, [96])) == [True]
        cluster.decode[0].publish(queued_tokens=200, waiting=2)
        await client.until_status(lambda status: [worker.waiting for worker in status.workers] == [5, 2])
        assert await ended(start(client, [96])) == [False]
