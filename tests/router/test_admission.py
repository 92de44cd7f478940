from __future__ import annotations

import asyncio
from typing import Any

import pytest

from baton.errors import OverloadedError, UnavailableError
from router.admission import AdmissionQueue, Entry
from router.ledger import Charge, Ledger
from router.placement import Demand, PlacementPolicy
from router.snapshot import ClusterSnapshot, WorkerKey, WorkerView

DECODE = WorkerKey("decode-0", 1)


class Scene:
    """A queue, and a cluster of decode workers (local prefill only) whose states the test sends."""

    def __init__(self, *, max_queued: int = 10, worker_wait_s: float = 60.0) -> None:
        self.lengths: list[int] = []
        self.ledger = Ledger()
        self.queue = AdmissionQueue(
            self.ledger,
            PlacementPolicy(watermark=0.0),
            max_queued=max_queued,
            worker_wait_s=worker_wait_s,
            on_length=self.lengths.append,
        )
        self.version = 0

    def state(self, *views: WorkerView, key: WorkerKey | None = DECODE) -> None:
        self.version += 1
        self.queue.update(ClusterSnapshot(self.version, (), views), key)

    def enter(self, priority: int = 0, num_tokens: int = 64) -> Entry:
        return self.queue.enter(Demand(num_tokens=num_tokens), priority)

    def admit(self, entry: Entry) -> asyncio.Task[Charge]:
        return asyncio.create_task(self.queue.admit(entry))


def decode(index: int = 0, *, free_blocks: int = 5, **changes: Any) -> WorkerView:
    """A busy worker with room for one request of 64 tokens."""
    fields = {"connected": True, "running": 1, "total_blocks": 100} | changes
    return WorkerView(key=WorkerKey(f"decode-{index}", index + 1), role="decode", free_blocks=free_blocks, **fields)


async def settle() -> None:
    """Lets every task run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_request_is_granted_at_once_where_there_is_room() -> None:
    scene = Scene()
    scene.state(decode())
    charge = await scene.queue.admit(scene.enter())
    assert charge.placement.decode == DECODE
    assert scene.ledger.pending[DECODE].blocks == 5


async def test_waiters_are_woken_by_a_state() -> None:
    scene = Scene()
    scene.state(decode(free_blocks=4))
    waiting = scene.admit(scene.enter())
    await settle()
    assert not waiting.done()
    assert len(scene.queue) == 1
    scene.state(decode(free_blocks=5))
    await waiting
    assert scene.lengths[-1] == 0


async def test_waiters_are_woken_by_a_placement_that_ends() -> None:
    scene = Scene()
    scene.state(decode())
    first = await scene.queue.admit(scene.enter())
    waiting = scene.admit(scene.enter())
    await settle()
    assert not waiting.done()
    scene.queue.release(first)
    await waiting


async def test_lower_priority_numbers_go_first_and_equals_in_order_of_arrival() -> None:
    scene = Scene()
    order: list[str] = []

    async def run(name: str, priority: int) -> None:
        await scene.queue.admit(scene.enter(priority))
        order.append(name)

    tasks = [asyncio.create_task(run(*entry)) for entry in [("a", 1), ("b", 1), ("urgent", -5), ("c", 0)]]
    await settle()
    for _ in tasks:
        scene.state(decode(free_blocks=5 + len(order) * 5))
        await settle()
    assert order == ["urgent", "c", "a", "b"]


async def test_nobody_overtakes_the_head() -> None:
    scene = Scene()
    scene.state(decode(free_blocks=5))
    big, small = scene.admit(scene.enter(num_tokens=640)), scene.admit(scene.enter(num_tokens=16))
    await settle()
    assert not big.done()
    assert not small.done()
    scene.state(decode(free_blocks=50))
    await asyncio.gather(big, small)


async def test_a_full_queue_refuses() -> None:
    scene = Scene(max_queued=1)
    waiting = scene.admit(scene.enter())
    await settle()
    with pytest.raises(OverloadedError, match="1 requests are queued, the most that may be"):
        scene.enter()
    waiting.cancel()
    await settle()
    scene.enter()


async def test_a_refused_request_comes_back_at_its_place_and_waits_for_a_state() -> None:
    scene = Scene()
    scene.state(decode(free_blocks=100))
    first = scene.enter()
    charge = await scene.queue.admit(first)
    scene.queue.release(charge)
    scene.queue.put_back(first, first.demand, avoid=DECODE)
    again, later = scene.admit(first), scene.admit(scene.enter())
    await settle()
    assert not again.done()
    assert not later.done()
    scene.state(decode(free_blocks=100))
    await asyncio.gather(again, later)


async def test_a_state_that_came_between_grant_and_refusal_is_new_enough() -> None:
    scene = Scene()
    scene.state(decode(free_blocks=100))
    entry = scene.enter()
    charge = await scene.queue.admit(entry)
    scene.state(decode(free_blocks=90))
    scene.queue.release(charge)
    scene.queue.put_back(entry, entry.demand, avoid=DECODE)
    charge = await scene.queue.admit(entry)
    scene.queue.release(charge)
    scene.queue.put_back(entry, entry.demand, avoid=DECODE)
    again = scene.admit(entry)
    await settle()
    assert not again.done()
    scene.state(decode(free_blocks=80))
    await again


async def test_an_idle_cluster_sends_no_state_and_is_not_waited_for() -> None:
    scene = Scene()
    scene.state(decode(running=0, free_blocks=100), decode(1, connected=False))
    refused, other = scene.enter(), scene.enter()
    charges = [await scene.queue.admit(entry) for entry in (refused, other)]
    scene.queue.release(charges[0])
    scene.queue.put_back(refused, refused.demand, avoid=DECODE)
    again = scene.admit(refused)
    await settle()
    assert not again.done(), "the other request's end will be told of"
    scene.queue.release(charges[1])
    await again


async def test_a_worker_that_is_giving_blocks_back_is_waited_for() -> None:
    scene = Scene()
    scene.state(decode(running=0, free_blocks=90))
    entry = scene.enter()
    scene.queue.release(await scene.queue.admit(entry))
    scene.queue.put_back(entry, entry.demand, avoid=DECODE)
    again = scene.admit(entry)
    await settle()
    assert not again.done()
    scene.state(decode(running=0, free_blocks=100))
    await again


async def test_a_refused_request_goes_to_another_worker_without_waiting() -> None:
    scene = Scene()
    scene.state(decode(0, free_blocks=100), decode(1, free_blocks=100))
    entry = scene.enter()
    scene.queue.put_back(entry, entry.demand, avoid=DECODE)
    assert (await scene.queue.admit(entry)).placement.decode == WorkerKey("decode-1", 2)


async def test_a_cancelled_waiter_leaves_the_queue_and_lets_others_through() -> None:
    scene = Scene()
    scene.state(decode(free_blocks=5))
    big, small = scene.admit(scene.enter(num_tokens=640)), scene.admit(scene.enter(num_tokens=16))
    await settle()
    big.cancel()
    await small
    assert len(scene.queue) == 0


async def test_a_grant_that_nobody_saw_is_given_back() -> None:
    scene = Scene()
    waiting = scene.admit(scene.enter())
    await settle()
    scene.state(decode())
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert waiting.cancelled()
    assert scene.ledger.pending == {}


async def test_waiting_without_any_decode_worker_ends() -> None:
    scene = Scene(worker_wait_s=0.02)
    scene.state(decode())
    scene.state(decode(connected=False))
    with pytest.raises(UnavailableError, match=r"no decode worker for 0\.02 s"):
        await scene.queue.admit(scene.enter())
    assert len(scene.queue) == 0


async def test_a_worker_that_comes_back_ends_that_wait() -> None:
    scene = Scene(worker_wait_s=0.02)
    scene.state(decode(connected=False))
    waiting = scene.admit(scene.enter())
    await settle()
    scene.state(decode(free_blocks=0))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    scene.state(decode())
    await waiting


async def test_closing_fails_all_that_wait() -> None:
    scene = Scene()
    waiting = scene.admit(scene.enter())
    await settle()
    scene.queue.close()
    with pytest.raises(UnavailableError, match="shutting down"):
        await waiting
