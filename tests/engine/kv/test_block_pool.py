"""The block pool hands out, shares, caches and takes back blocks as vLLM's does."""

import pytest

from engine.kv.block_pool import BlockPool


def ids(blocks):
    return [block.block_id for block in blocks]


def cached_chain(pool, *keys):
    """Blocks in use with one key each."""
    blocks = pool.allocate(len(keys))
    for block, key in zip(blocks, keys, strict=True):
        pool.register(block, key)
    return blocks


def test_a_new_pool_is_free_but_for_the_null_block():
    pool = BlockPool(5)
    assert (pool.num_blocks, pool.num_usable, pool.num_free, pool.usage) == (5, 4, 4, 0.0)
    assert pool.null_block.is_null
    assert pool.null_block.block_id == 0
    pool.check()


def test_allocation_takes_from_the_front_and_counts_one_reference():
    pool = BlockPool(5)
    blocks = pool.allocate(3)
    assert ids(blocks) == [1, 2, 3]
    assert [block.ref_count for block in blocks] == [1, 1, 1]
    assert pool.usage == 0.75
    pool.check()


def test_allocating_more_than_is_free_is_a_bug():
    pool = BlockPool(3)
    with pytest.raises(AssertionError, match="3 blocks asked for, 2 free"):
        pool.allocate(3)
    assert pool.num_free == 2


def test_uncached_blocks_are_reused_first_and_last_in_first_out():
    pool = BlockPool(6)
    first, second = pool.allocate(2), pool.allocate(1)
    pool.free(first)
    pool.free(second)
    assert ids(pool.allocate(5)) == [3, 1, 2, 4, 5]


def test_cached_blocks_are_reused_last_least_recently_freed_first():
    pool = BlockPool(6)
    one, two = cached_chain(pool, b"a", b"b"), cached_chain(pool, b"c")
    pool.free(reversed(one))
    pool.free(two)
    assert ids(pool.allocate(5)) == [4, 5, 2, 1, 3]
    assert pool.cached_keys() == []


def test_free_returns_what_became_free():
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    pool.touch(blocks[:1])
    assert pool.free([*blocks, pool.null_block]) == blocks[1:]


def test_freeing_twice_is_a_bug():
    pool = BlockPool(4)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(blocks)


def test_an_unreferenced_cached_block_is_found_and_counts_as_free():
    pool = BlockPool(4)
    (block,) = cached_chain(pool, b"a")
    pool.free([block])
    assert pool.num_free == 3
    assert pool.lookup(b"a") is block
    pool.check()


def test_touch_takes_a_free_block_out_of_the_middle_of_the_queue():
    pool = BlockPool(5)
    blocks = cached_chain(pool, b"a", b"b", b"c", b"d")
    pool.free(blocks)
    pool.touch(blocks[1:3])
    pool.touch(blocks[1:2])
    assert [block.ref_count for block in blocks] == [0, 2, 1, 0]
    pool.check()
    assert ids(pool.allocate(2)) == [1, 4]
    assert pool.lookup(b"b") is blocks[1]


def test_the_null_block_is_passed_over():
    pool = BlockPool(4)
    pool.touch([pool.null_block])
    assert pool.free([pool.null_block]) == []
    assert pool.num_free == 3
    pool.check()


def test_identical_blocks_are_kept_side_by_side():
    pool = BlockPool(4)
    (first,), (second,) = cached_chain(pool, b"a"), cached_chain(pool, b"a")
    assert pool.lookup(b"a") is first
    pool.evict([first])
    assert pool.lookup(b"a") is second
    pool.check()
    pool.evict([second])
    assert pool.lookup(b"a") is None


def test_registering_again_under_the_same_key_does_nothing_and_under_another_is_a_bug():
    pool = BlockPool(4)
    (block,) = cached_chain(pool, b"a")
    pool.register(block, b"a")
    assert pool.take_events() == ([b"a"], [])
    with pytest.raises(AssertionError, match="another key"):
        pool.register(block, b"b")


def test_registering_a_free_block_is_a_bug():
    pool = BlockPool(4)
    (block,) = pool.allocate(1)
    pool.free([block])
    with pytest.raises(AssertionError, match="while it is free"):
        pool.register(block, b"a")


def test_evict_drops_the_key_but_neither_references_nor_the_place_in_the_queue():
    pool = BlockPool(4)
    blocks = cached_chain(pool, b"a", b"b", b"c")
    pool.free(blocks[:2])
    pool.evict([blocks[1], blocks[2], blocks[2]])
    assert blocks[2].ref_count == 1
    assert pool.cached_keys() == [b"a"]
    assert ids(pool.allocate(2)) == [1, 2]
    pool.check()


def test_without_caching_nothing_is_found_and_blocks_are_reused_at_once():
    pool = BlockPool(4, enable_caching=False)
    (block,) = cached_chain(pool, b"a")
    assert pool.lookup(b"a") is None
    pool.free([block])
    assert pool.allocate(1) == [block]
    assert pool.take_events() == ([], [])


class TestEvents:
    def test_each_change_is_told_once(self):
        pool = BlockPool(4)
        blocks = cached_chain(pool, b"a", b"b")
        assert pool.take_events() == ([b"a", b"b"], [])
        pool.evict(blocks[:1])
        assert pool.take_events() == ([], [b"a"])
        assert pool.take_events() == ([], [])

    def test_a_key_is_removed_with_its_last_block(self):
        pool = BlockPool(4)
        (first,), (second,) = cached_chain(pool, b"a"), cached_chain(pool, b"a")
        pool.take_events()
        pool.evict([first])
        assert pool.take_events() == ([], [])
        pool.evict([second])
        assert pool.take_events() == ([], [b"a"])

    def test_what_came_and_went_between_is_not_told(self):
        pool = BlockPool(4)
        pool.evict(cached_chain(pool, b"a"))
        assert pool.take_events() == ([], [])

    def test_what_went_and_came_back_between_is_not_told(self):
        pool = BlockPool(4)
        (block,) = cached_chain(pool, b"a")
        pool.take_events()
        pool.evict([block])
        pool.register(block, b"a")
        assert pool.take_events() == ([], [])

    def test_eviction_by_allocation_is_told(self):
        pool = BlockPool(2)
        pool.free(cached_chain(pool, b"a"))
        pool.take_events()
        pool.allocate(1)
        assert pool.take_events() == ([], [b"a"])


class TestCheck:
    """The integrity check notices each kind of damage."""

    def test_a_reference_without_leaving_the_queue(self):
        pool = BlockPool(4)
        pool.blocks()[2].ref_count = 1
        with pytest.raises(AssertionError, match="disagree"):
            pool.check()

    def test_a_free_block_outside_the_queue(self):
        pool = BlockPool(4)
        (block,) = pool.allocate(1)
        block.ref_count = 0
        with pytest.raises(AssertionError, match="disagree"):
            pool.check()

    def test_a_broken_link(self):
        pool = BlockPool(4)
        blocks = pool.blocks()
        blocks[3].prev_free = blocks[1]
        with pytest.raises(AssertionError, match="does not point back"):
            pool.check()

    def test_a_key_that_the_map_does_not_know(self):
        pool = BlockPool(4)
        pool.blocks()[1].key = b"a"
        with pytest.raises(AssertionError, match="not in the map"):
            pool.check()

    def test_a_key_that_differs_from_the_map(self):
        pool = BlockPool(4)
        (block,) = cached_chain(pool, b"a")
        block.key = b"b"
        with pytest.raises(AssertionError, match="another key"):
            pool.check()
