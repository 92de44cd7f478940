from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from baton.internal.v1 import worker_pb2_grpc
from bench.mock_workers.cluster import MockCluster
from bench.mock_workers.decode import MockDecode
from router.attach import AttachStream
from router.snapshot import WorkerKey
from router.worker_link import open_channel
from tests.router.test_request_state import new_attempt


class Attached:
    """A stream to a mock worker, and a way to wait until it comes up or goes down."""

    def __init__(self, stub: worker_pb2_grpc.DecodeWorkerAsyncStub, worker: MockDecode) -> None:
        self.stream = AttachStream(
            stub, WorkerKey(worker.name, worker.epoch), "router-test", self._listen, reattach_s=1.0
        )
        self.task = asyncio.create_task(self.stream.run())
        self.changes: list[bool] = []
        self._changed = asyncio.Event()

    def _listen(self) -> None:
        self.changes.append(self.stream.up)
        self._changed.set()

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


@contextlib.asynccontextmanager
async def attached() -> AsyncIterator[tuple[Attached, MockDecode]]:
    async with MockCluster(num_prefill=0) as cluster:
        worker = cluster.decode[0]
        async with open_channel(worker.address, 1 << 20) as channel:
            attached = Attached(worker_pb2_grpc.DecodeWorkerStub(channel), worker)
            await attached.until(lambda: attached.stream.up)
            yield attached, worker
            attached.task.cancel()
            await asyncio.gather(attached.task, return_exceptions=True)


async def test_a_stream_that_is_reset_is_opened_again() -> None:
    async with attached() as (attach, worker):
        for num_resets in (1, 2):
            attach.stream.reset()
            await attach.until(lambda num_resets=num_resets: len(attach.changes) == 2 * num_resets + 1)  # type: ignore[misc]
        assert attach.changes == [True, False, True, False, True]
        assert len(worker.hellos) == 3


async def test_cancelling_the_task_ends_it() -> None:
    async with attached() as (attach, worker):
        attach.task.cancel()
        await asyncio.gather(attach.task, return_exceptions=True)
        assert attach.task.cancelled()
        assert len(worker.hellos) == 1


async def test_a_worker_is_told_each_acknowledgement_once_and_the_last_one_of_a_choice_that_ended() -> None:
    async with attached() as (attach, worker):
        attempt = new_attempt()
        attach.stream.add(attempt)
        for position in range(1, 4):
            attach.stream.acknowledge(attempt, 0, position)
        attach.stream.acknowledge(attempt, 0, 4, ended=True)
        await worker.until(lambda: worker.acks)
        # The timer that the first ones set has nothing left to tell.
        attach.stream.acknowledge(attempt, 0, 5)
        await worker.until(lambda: worker.acks[-1][2] == 5)
        assert [position for *_, position in worker.acks] == [4, 5]
        assert worker.num_ack_messages == 2
