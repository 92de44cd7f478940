from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.ledger import Ledger
from router.placement import (
    Blocked,
    Decision,
    Demand,
    Pending,
    Placement,
    PlacementPolicy,
    has_credit,
    has_room,
    num_blocks_needed,
    num_lacking,
    place,
)
from router.snapshot import ClusterSnapshot, PrefixView, WorkerKey, WorkerView

POLICY = PlacementPolicy(local_prefill_tokens=32, backlog_prefill_tokens=512, watermark=0.1)
HASHES = tuple(number.to_bytes(32, "big") for number in range(64))


def worker(role: str, index: int = 0, *, cached: int = 0, **changes: Any) -> WorkerView:
    defaults: dict[str, Any] = {"connected": True, "free_blocks": 100, "total_blocks": 100, "token_credit": 4096}
    return WorkerView(
        key=WorkerKey(f"{role}-{index}", index + 1),
        role=role,
        cached=PrefixView(frozenset(HASHES[:cached])),
        **(defaults | changes),
    )


def cluster(*workers: WorkerView) -> ClusterSnapshot:
    return ClusterSnapshot(
        1,
        tuple(view for view in workers if view.role == "prefill"),
        tuple(view for view in workers if view.role == "decode"),
    )


def demand(num_tokens: int = 640, **changes: Any) -> Demand:
    return Demand(**{"num_tokens": num_tokens, "block_hashes": HASHES[: num_tokens // 16], **changes})


def placed(result: Placement | Blocked) -> Placement:
    assert isinstance(result, Placement), result
    return result


class TestWhoPrefills:
    def test_a_long_prompt_goes_to_a_prefill_worker(self) -> None:
        placement = placed(place(cluster(worker("prefill"), worker("decode")), {}, demand(), POLICY))
        assert placement.decision is Decision.REMOTE
        assert placement.prefill == WorkerKey("prefill-0", 1)
        assert placement.prefill_tokens == 640

    @pytest.mark.parametrize(("num_tokens", "expected"), [(31, Decision.LOCAL_SHORT), (32, Decision.REMOTE)])
    def test_a_short_prompt_stays_at_the_decode_worker(self, num_tokens: int, expected: Decision) -> None:
        snapshot = cluster(worker("prefill"), worker("decode"))
        assert placed(place(snapshot, {}, demand(num_tokens), POLICY)).decision is expected

    def test_a_prompt_whose_rest_is_short_stays_at_the_decode_worker(self) -> None:
        snapshot = cluster(worker("prefill", cached=40), worker("decode", cached=39))
        placement = placed(place(snapshot, {}, demand(640), POLICY))
        assert placement.decision is Decision.LOCAL_SHORT
        assert placement.prefill_tokens == 16

    def test_much_cached_at_the_decode_worker_and_nothing_at_the_prefill_worker_is_local(self) -> None:
        snapshot = cluster(worker("prefill"), worker("decode", cached=37))
        assert placed(place(snapshot, {}, demand(640), POLICY)).decision is Decision.LOCAL_CACHED

    def test_the_same_with_a_prefill_worker_that_has_it_too_is_remote(self) -> None:
        snapshot = cluster(worker("prefill", cached=37), worker("decode", cached=37))
        assert placed(place(snapshot, {}, demand(640), POLICY)).decision is Decision.REMOTE

    @pytest.mark.parametrize("state", [{"connected": False}, {"draining": True}])
    def test_without_a_usable_prefill_worker_it_is_local(self, state: dict[str, bool]) -> None:
        snapshot = cluster(worker("prefill", **state), worker("decode"))
        placement = placed(place(snapshot, {}, demand(), POLICY))
        assert placement.decision is Decision.LOCAL_NO_PREFILL_WORKER
        assert placement.prefill is None

    def test_a_busy_prefill_worker_is_waited_for(self) -> None:
        snapshot = cluster(worker("prefill", queued_tokens=4000), worker("decode"))
        assert place(snapshot, {}, demand(), POLICY) is Blocked.NO_CREDIT

    def test_an_avoided_prefill_worker_is_not_replaced_by_local_prefill(self) -> None:
        avoiding = demand(avoid=frozenset({WorkerKey("prefill-0", 1)}))
        assert place(cluster(worker("prefill"), worker("decode")), {}, avoiding, POLICY) is Blocked.NO_CREDIT

    def test_the_prefill_worker_that_is_done_first_wins(self) -> None:
        snapshot = cluster(
            worker("prefill", 0, cached=20, queued_tokens=1000), worker("prefill", 1), worker("decode", 2)
        )
        assert placed(place(snapshot, {}, demand(), POLICY)).prefill == WorkerKey("prefill-1", 2)

    def test_a_cached_prefix_draws_a_request_to_its_prefill_worker(self) -> None:
        snapshot = cluster(worker("prefill", 0), worker("prefill", 1, cached=20), worker("decode", 2))
        placement = placed(place(snapshot, {}, demand(), POLICY))
        assert placement.prefill == WorkerKey("prefill-1", 2)
        assert placement.prefill_tokens == 640 - 320


class TestBacklog:
    """Who prefills a prompt of 256 tokens, or another, when there is a queue: at a decode worker a token takes as long
    as three at a prefill worker, and sending it as long as a quarter."""

    @staticmethod
    def decided(*workers: WorkerView, **changes: Any) -> Decision:
        return placed(place(cluster(*workers), {}, demand(**{"num_tokens": 256, **changes}), POLICY)).decision

    @pytest.mark.parametrize(
        ("remote_queue", "local_queue", "expected"),
        [
            (0, 0, Decision.REMOTE),
            # 3 * 256 = 448 + 256 + 256 / 4: of two that are done at the same time the prefill worker wins.
            (448, 0, Decision.REMOTE),
            (449, 0, Decision.LOCAL_BACKLOG),
            (449, 1, Decision.REMOTE),
            (1216, 256, Decision.REMOTE),
            (1217, 256, Decision.LOCAL_BACKLOG),
            (0, 5000, Decision.REMOTE),
        ],
    )
    def test_a_short_prompt_goes_where_it_is_done_first(
        self, remote_queue: int, local_queue: int, expected: Decision
    ) -> None:
        busy = worker("prefill", queued_tokens=remote_queue)
        assert self.decided(busy, worker("decode", queued_tokens=local_queue)) is expected

    @pytest.mark.parametrize(
        ("num_tokens", "expected"), [(512, Decision.LOCAL_BACKLOG), (513, Decision.REMOTE), (1024, Decision.REMOTE)]
    )
    def test_a_long_prompt_waits_for_a_prefill_worker(self, num_tokens: int, expected: Decision) -> None:
        busy = worker("prefill", queued_tokens=100_000, token_credit=10**6)
        assert self.decided(busy, worker("decode"), num_tokens=num_tokens) is expected

    def test_0_turns_it_off(self) -> None:
        snapshot = cluster(worker("prefill", queued_tokens=3000), worker("decode"))
        policy = dataclasses.replace(POLICY, backlog_prefill_tokens=0)
        assert placed(place(snapshot, {}, demand(256), policy)).decision is Decision.REMOTE

    def test_what_is_cached_at_the_decode_worker_does_not_count(self) -> None:
        busy = worker("prefill", cached=20, queued_tokens=3000)
        assert self.decided(busy, worker("decode", cached=20), num_tokens=832) is Decision.LOCAL_BACKLOG
        assert self.decided(busy, worker("decode", cached=19), num_tokens=832) is Decision.REMOTE

    def test_a_scored_prompt_is_computed_whole(self) -> None:
        busy, cached = worker("prefill", queued_tokens=3000), worker("decode", cached=40)
        assert self.decided(busy, cached, num_tokens=640, block_hashes=()) is Decision.REMOTE
        assert self.decided(busy, cached, num_tokens=480, block_hashes=()) is Decision.LOCAL_BACKLOG

    def test_every_prefill_worker_must_have_a_backlog(self) -> None:
        busy = worker("prefill", 0, queued_tokens=3000)
        assert self.decided(busy, worker("prefill", 1), worker("decode", 2)) is Decision.REMOTE
        draining = worker("prefill", 1, draining=True)
        assert self.decided(busy, draining, worker("decode", 2)) is Decision.LOCAL_BACKLOG

    def test_a_draining_decode_worker_takes_none(self) -> None:
        snapshot = cluster(
            worker("prefill", queued_tokens=1000),
            worker("decode", 1, draining=True),
            worker("decode", 2, queued_tokens=1000),
        )
        placement = placed(place(snapshot, {}, demand(256), POLICY))
        assert (placement.decode.name, placement.decision) == ("decode-2", Decision.REMOTE)

    def test_the_decode_worker_with_the_shorter_queue_takes_it(self) -> None:
        snapshot = cluster(
            worker("prefill", queued_tokens=3000), worker("decode", 1, queued_tokens=300), worker("decode", 2)
        )
        placement = placed(place(snapshot, {}, demand(256), POLICY))
        assert (placement.decode.name, placement.decision) == ("decode-2", Decision.LOCAL_BACKLOG)
        assert placement.prefill_tokens == 256

    def test_without_credit_a_short_prompt_need_not_wait(self) -> None:
        assert self.decided(worker("prefill", queued_tokens=4096), worker("decode")) is Decision.LOCAL_BACKLOG

    def test_nothing_is_known_of_the_wait_where_every_prefill_worker_is_avoided(self) -> None:
        snapshot = cluster(worker("prefill", queued_tokens=3000), worker("decode"))
        avoiding = demand(256, avoid=frozenset({WorkerKey("prefill-0", 1)}))
        assert place(snapshot, {}, avoiding, POLICY) is Blocked.NO_CREDIT

    @pytest.mark.parametrize("num_tokens", [64, 256, 512])
    def test_of_a_burst_both_sides_are_done_at_about_the_same_time(self, num_tokens: int) -> None:
        """All placed from one and the same snapshot: only the ledger knows of the queues."""
        snapshot = cluster(
            worker("prefill", token_credit=10**6), worker("decode", free_blocks=10_000, total_blocks=10_000)
        )
        ledger = Ledger()
        for _ in range(32):
            ledger.charge(placed(place(snapshot, ledger.pending, demand(num_tokens), POLICY)))
        (prefill,), (decode,) = snapshot.prefill, snapshot.decode
        at_prefill, at_decode = (ledger.pending[view.key].prefill_tokens for view in (prefill, decode))
        assert at_prefill + at_decode == 32 * num_tokens
        assert abs(at_prefill - POLICY.local_slowdown * at_decode) <= POLICY.local_slowdown * num_tokens


class TestWhoDecodes:
    def test_none_connected(self) -> None:
        snapshot = cluster(worker("prefill"), worker("decode", connected=False))
        assert place(snapshot, {}, demand(), POLICY) is Blocked.NO_DECODE_WORKER

    def test_a_busy_worker_must_stay_above_its_watermark(self) -> None:
        # 41 blocks are needed and 10 must stay free.
        enough, short = worker("decode", running=1, free_blocks=51), worker("decode", running=1, free_blocks=50)
        assert placed(place(cluster(worker("prefill"), enough), {}, demand(), POLICY)).blocks == 41
        assert place(cluster(worker("prefill"), short), {}, demand(), POLICY) is Blocked.NO_BLOCKS

    def test_an_idle_worker_takes_what_fits_it_alone(self) -> None:
        snapshot = cluster(worker("prefill"), worker("decode", free_blocks=41))
        assert placed(place(snapshot, {}, demand(), POLICY)).blocks == 41

    def test_blocks_that_were_placed_and_are_not_visible_yet_count(self) -> None:
        snapshot = cluster(worker("prefill"), worker("decode", free_blocks=60))
        pending = {WorkerKey("decode-0", 1): Pending(blocks=10, requests=1)}
        assert place(snapshot, pending, demand(), POLICY) is Blocked.NO_BLOCKS

    def test_the_less_loaded_worker_wins(self) -> None:
        snapshot = cluster(
            worker("prefill"), worker("decode", 1, running=9, free_blocks=90), worker("decode", 2, free_blocks=90)
        )
        assert placed(place(snapshot, {}, demand(), POLICY)).decode == WorkerKey("decode-2", 3)

    def test_a_cached_prefix_draws_a_request_to_its_decode_worker(self) -> None:
        snapshot = cluster(worker("prefill"), worker("decode", 1), worker("decode", 2, cached=20))
        assert placed(place(snapshot, {}, demand(), POLICY)).decode == WorkerKey("decode-2", 3)

    def test_the_one_that_refused_is_avoided(self) -> None:
        snapshot = cluster(worker("prefill"), worker("decode", 1), worker("decode", 2))
        avoiding = demand(avoid=frozenset({WorkerKey("decode-1", 2)}))
        assert placed(place(snapshot, {}, avoiding, POLICY)).decode == WorkerKey("decode-2", 3)


def test_a_fully_cached_prompt_still_lacks_its_last_block() -> None:
    assert num_lacking(worker("decode", cached=40), demand(640)) == 16
    assert num_lacking(worker("decode", cached=40), demand(641)) == 1


def test_each_further_choice_needs_a_tail_block() -> None:
    assert num_blocks_needed(worker("decode"), demand(640)) == 41
    assert num_blocks_needed(worker("decode"), demand(640, own_tokens=[0] * 4)) == 44
    assert num_blocks_needed(worker("decode", cached=10), demand(640)) == 31


def test_a_choice_that_resumes_needs_blocks_for_its_own_tokens() -> None:
    assert num_blocks_needed(worker("decode"), demand(640, own_tokens=[15, 0])) == 40 + 1 + 1
    assert num_blocks_needed(worker("decode"), demand(640, own_tokens=[16, 33])) == 40 + 2 + 3
    assert num_blocks_needed(worker("decode"), demand(650, own_tokens=[6, 0])) == 40 + 2 + 1


def test_every_group_of_layers_needs_its_blocks() -> None:
    assert num_blocks_needed(worker("decode", num_groups=3), demand(640)) == 3 * 41
    assert num_blocks_needed(worker("decode", num_groups=3, cached=10), demand(640)) == 3 * 31
    enough, short = (
        worker("decode", running=1, num_groups=2, free_blocks=free, total_blocks=200) for free in (102, 101)
    )
    assert has_room(enough, {}, demand(), POLICY)
    assert not has_room(short, {}, demand(), POLICY)


_workers: st.SearchStrategy[dict[str, Any]] = st.builds(
    dict,
    cached=st.integers(0, 64),
    connected=st.booleans(),
    draining=st.sampled_from([False, False, True]),
    running=st.integers(0, 8),
    waiting=st.integers(0, 3),
    free_blocks=st.integers(0, 100),
    queued_tokens=st.integers(0, 6000),
)
_demands = st.builds(demand, st.integers(1, 1024), own_tokens=st.lists(st.integers(0, 100), min_size=1, max_size=4))


def _cluster_of(prefill: list[dict[str, Any]], decode: list[dict[str, Any]]) -> ClusterSnapshot:
    return cluster(
        *(worker("prefill", index, **fields) for index, fields in enumerate(prefill)),
        *(worker("decode", 10 + index, **fields) for index, fields in enumerate(decode)),
    )


@given(st.lists(_workers, max_size=4), st.lists(_workers, max_size=4), _demands)
def test_a_placement_keeps_every_rule(
    prefill: list[dict[str, Any]], decode: list[dict[str, Any]], wanted: Demand
) -> None:
    snapshot = _cluster_of(prefill, decode)
    result = place(snapshot, {}, wanted, POLICY)
    usable_prefill = [view for view in snapshot.prefill if view.usable]
    usable_decode = [view for view in snapshot.decode if view.usable]
    if result is Blocked.NO_DECODE_WORKER:
        assert not usable_decode
    elif result is Blocked.NO_BLOCKS:
        assert not any(has_room(view, {}, wanted, POLICY) for view in usable_decode)
    elif result is Blocked.NO_CREDIT:
        assert usable_prefill
        assert not any(has_credit(view, {}, wanted) for view in usable_prefill)
    else:
        assert isinstance(result, Placement)
        chosen = next(view for view in usable_decode if view.key == result.decode)
        assert has_room(chosen, {}, wanted, POLICY)
        assert 1 <= result.prefill_tokens <= wanted.num_tokens
        assert result.blocks >= 1
        if num_lacking(chosen, wanted) < POLICY.local_prefill_tokens or not usable_prefill:
            assert result.prefill is None
        if result.decision is Decision.LOCAL_BACKLOG:
            assert num_lacking(chosen, wanted) <= POLICY.backlog_prefill_tokens
        if result.prefill is not None:
            source = next(view for view in usable_prefill if view.key == result.prefill)
            assert has_credit(source, {}, wanted)


@given(st.lists(_workers, max_size=4), st.lists(_workers, max_size=4), _demands, st.randoms(use_true_random=False))
def test_the_order_of_workers_does_not_matter(
    prefill: list[dict[str, Any]], decode: list[dict[str, Any]], wanted: Demand, rng: random.Random
) -> None:
    snapshot = _cluster_of(prefill, decode)
    shuffled = dataclasses.replace(
        snapshot,
        prefill=tuple(rng.sample(snapshot.prefill, len(snapshot.prefill))),
        decode=tuple(rng.sample(snapshot.decode, len(snapshot.decode))),
    )
    assert place(snapshot, {}, wanted, POLICY) == place(shuffled, {}, wanted, POLICY)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 20))
def test_a_burst_spreads_evenly_over_equal_workers(num_prefill: int, num_decode: int, num_requests: int) -> None:
    """All placed from one and the same snapshot: only the ledger tells them apart."""
    snapshot = cluster(
        *(worker("prefill", index, token_credit=10**6) for index in range(num_prefill)),
        *(worker("decode", 10 + index, free_blocks=10_000, total_blocks=10_000) for index in range(num_decode)),
    )
    ledger = Ledger()
    placements = []
    for _ in range(num_requests):
        placements.append(placed(place(snapshot, ledger.pending, demand(), POLICY)))
        ledger.charge(placements[-1])
    for view in snapshot.prefill:
        count = sum(placement.prefill == view.key for placement in placements)
        assert num_requests // num_prefill <= count <= -(-num_requests // num_prefill)
    for view in snapshot.decode:
        count = sum(placement.decode == view.key for placement in placements)
        assert num_requests // num_decode <= count <= -(-num_requests // num_decode)
