from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest

from bench.mock_workers.cluster import MockCluster
from router.membership import Membership
from router.snapshot import ClusterSnapshot, WorkerKey
from router.worker_link import LinkOptions

OPTIONS = LinkOptions(router_id="router-test", lease_s=3.0, call_timeout_s=5.0, max_message_bytes=1 << 20)


class Following:
    """A membership, and a way to wait for a snapshot."""

    def __init__(self, address: str) -> None:
        self.membership = Membership(address, OPTIONS)
        self._changed = asyncio.Event()
        self.changed_workers: list[WorkerKey | None] = []
        self.membership.subscribe(self._listen)

    def _listen(self, snapshot: ClusterSnapshot, key: WorkerKey | None) -> None:
        self.changed_workers.append(key)
        self._changed.set()

    async def until(self, condition: Callable[[ClusterSnapshot], object]) -> ClusterSnapshot:
        async with asyncio.timeout(10):
            while not condition(self.membership.snapshot):
                self._changed.clear()
                await self._changed.wait()
        return self.membership.snapshot


@contextlib.asynccontextmanager
async def following(cluster: MockCluster) -> AsyncIterator[Following]:
    follower = Following(cluster.membership.address)
    follower.membership.start()
    try:
        yield follower
    finally:
        await follower.membership.close()


async def test_workers_appear_and_are_connected() -> None:
    async with MockCluster(num_decode=2) as cluster, following(cluster) as follower:
        snapshot = await follower.until(
            lambda snapshot: all(view.connected for view in snapshot.decode) and snapshot.ready
        )
        assert [view.key for view in snapshot.prefill] == [WorkerKey("prefill-0", 1)]
        assert [view.key for view in snapshot.decode] == [WorkerKey("decode-0", 2), WorkerKey("decode-1", 3)]
        assert (await follower.membership.model_layout()).model == "mock"


async def test_states_update_the_view_and_raise_the_version() -> None:
    async with MockCluster() as cluster, following(cluster) as follower:
        before = await follower.until(lambda snapshot: snapshot.ready)
        cluster.decode[0].publish(free_blocks=7, running=3, draining=True)
        after = await follower.until(lambda snapshot: snapshot.decode[0].free_blocks == 7)
        assert after.version > before.version
        assert (after.decode[0].running, after.decode[0].usable) == (3, False)
        assert before.decode[0].free_blocks == 64
        assert follower.changed_workers[-1] == WorkerKey("decode-0", 2)


async def test_hashes_follow_stored_and_removed() -> None:
    first, second = (bytes([number]) * 32 for number in (1, 2))
    group_0, group_1 = bytes(4), bytes([0, 0, 0, 1])
    async with MockCluster() as cluster, following(cluster) as follower:
        await follower.until(lambda snapshot: snapshot.ready)
        decode = cluster.decode[0]
        decode.publish(stored=[first + group_0, second + group_1])
        snapshot = await follower.until(lambda snapshot: first in snapshot.decode[0].cached)
        assert second not in snapshot.decode[0].cached
        decode.publish(stored=[second + group_0], removed=[first + group_0])
        snapshot = await follower.until(lambda snapshot: second in snapshot.decode[0].cached)
        assert first not in snapshot.decode[0].cached


async def test_a_gap_is_healed_by_a_new_snapshot() -> None:
    lost, seen = (bytes([number]) * 32 + bytes(4) for number in (1, 2))
    async with MockCluster() as cluster, following(cluster) as follower:
        await follower.until(lambda snapshot: snapshot.ready)
        decode = cluster.decode[0]
        num_watches = decode.num_watches
        decode.skip_sequence()
        decode.hashes.add(lost)
        decode.publish(stored=[seen])
        snapshot = await follower.until(lambda snapshot: lost[:32] in snapshot.decode[0].cached)
        assert seen[:32] in snapshot.decode[0].cached
        assert decode.num_watches == num_watches + 1


async def test_a_broken_watch_disconnects_until_it_is_back() -> None:
    async with MockCluster() as cluster, following(cluster) as follower:
        await follower.until(lambda snapshot: snapshot.ready)
        cluster.prefill[0].break_watch()
        await follower.until(lambda snapshot: not snapshot.ready)
        await follower.until(lambda snapshot: snapshot.ready)


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_dead_worker_is_not_connected_although_it_is_a_member(role: str) -> None:
    async with MockCluster() as cluster, following(cluster) as follower:
        await follower.until(lambda snapshot: snapshot.ready)
        await getattr(cluster, role)[0].stop()
        snapshot = await follower.until(lambda snapshot: not snapshot.ready)
        assert len(getattr(snapshot, role)) == 1


async def test_a_decode_worker_that_refuses_to_be_attached_is_not_connected() -> None:
    async with MockCluster() as cluster:
        decode = cluster.decode[0]
        decode.accepts_attach = False
        async with following(cluster) as follower:
            await decode.until(lambda: len(decode.hellos) >= 2)
            assert not follower.membership.snapshot.decode[0].connected
            decode.accepts_attach = True
            await follower.until(lambda snapshot: snapshot.ready)


async def test_a_member_that_left_is_forgotten_and_its_limits_are_not() -> None:
    async with MockCluster() as cluster, following(cluster) as follower:
        await follower.until(lambda snapshot: snapshot.ready)
        decode = cluster.decode[0]
        await cluster.remove(decode)
        await follower.until(lambda snapshot: not snapshot.decode)
        assert follower.membership.decode_link(WorkerKey("decode-0", 2)) is None
        assert [info.name for info in follower.membership.decode_infos] == ["decode-0"]


async def test_a_new_epoch_is_a_new_worker() -> None:
    async with MockCluster() as cluster, following(cluster) as follower:
        await follower.until(lambda snapshot: snapshot.ready)
        old = cluster.decode[0]
        new = await cluster.add_decode("decode-0")
        await cluster.remove(old)
        snapshot = await follower.until(
            lambda snapshot: snapshot.ready and snapshot.decode[0].key == WorkerKey("decode-0", new.epoch)
        )
        assert len(snapshot.decode) == 1
        assert new.hellos[-1].epoch == new.epoch


async def test_losing_the_supervisor_changes_nothing() -> None:
    async with MockCluster() as cluster, following(cluster) as follower:
        await follower.until(lambda snapshot: snapshot.ready)
        await cluster.membership.stop()
        cluster.decode[0].publish(free_blocks=5)
        snapshot = await follower.until(lambda snapshot: snapshot.decode[0].free_blocks == 5)
        assert snapshot.ready
