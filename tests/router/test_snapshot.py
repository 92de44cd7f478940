from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.snapshot import ClusterSnapshot, PrefixView, WorkerKey, WorkerView


def key(number: int, group: int = 0) -> bytes:
    return number.to_bytes(32, "big") + group.to_bytes(4, "big")


def block_hash(number: int) -> bytes:
    return number.to_bytes(32, "big")


def test_num_leading_stops_at_the_first_block_that_is_not_cached() -> None:
    view = PrefixView.of_keys([key(1), key(2), key(4)])
    assert view.num_leading([block_hash(number) for number in (1, 2, 3, 4)]) == 2
    assert view.num_leading([]) == 0


def test_only_the_first_group_counts() -> None:
    assert PrefixView.of_keys([key(1, group=1)]).num_leading([block_hash(1)]) == 0


def test_an_update_leaves_the_old_view_as_it_was() -> None:
    before = PrefixView.of_keys([key(1)])
    after = before.updated(stored=[key(2)], removed=[key(1)])
    assert block_hash(1) in before
    assert block_hash(2) not in before
    assert block_hash(1) not in after
    assert block_hash(2) in after


_events = st.lists(st.tuples(st.sets(st.integers(0, 3000), max_size=700), st.sets(st.integers(0, 3000), max_size=700)))


@given(_events)
def test_updates_add_up_to_a_plain_set(events: list[tuple[set[int], set[int]]]) -> None:
    """Also across the fold of the difference into the base."""
    view, model = PrefixView(), set[int]()
    for stored, removed in events:
        view = view.updated([key(number) for number in stored], [key(number) for number in removed])
        model = (model - removed) | stored
    assert {number for number in range(3001) if block_hash(number) in view} == model


def test_a_cluster_is_ready_with_a_connected_worker_of_each_role() -> None:
    prefill = WorkerView(key=WorkerKey("prefill-0", 1), role="prefill", connected=True)
    decode = WorkerView(key=WorkerKey("decode-0", 2), role="decode", connected=True)
    lost = WorkerView(key=WorkerKey("decode-0", 2), role="decode", connected=False)
    assert ClusterSnapshot(1, (prefill,), (decode,)).ready
    assert not ClusterSnapshot(1, (prefill,), (lost,)).ready
    assert not ClusterSnapshot(1, (), (decode,)).ready
