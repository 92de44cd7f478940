"""The paged cache: sequences begin with a hit, grow, lose what their windows have passed, fork, and give all back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.hashing import extend_chain, root_hash
from engine.kv.cache import KVCache
from engine.kv.layout import KVGroup, KVLayout

BLOCK_SIZE = 4


def layout_of(*windows, dtype=torch.float32):
    groups = tuple(KVGroup((layer,), window) for layer, window in enumerate(windows))
    return KVLayout(groups, num_kv_heads=2, head_dim=2, block_size=BLOCK_SIZE, dtype=dtype)


def hashes(token_ids):
    return extend_chain(root_hash("test"), token_ids, BLOCK_SIZE)


def held(seq):
    """For each group the ordinals that carry a block."""
    return [[ordinal for ordinal, block in enumerate(table) if not block.is_null] for table in seq.tables]


def computed(cache, token_ids):
    """A sequence whose tokens are all computed and registered, with nothing freed."""
    seq = cache.begin()
    assert cache.allocate(seq, len(token_ids))
    cache.register(seq, hashes(token_ids), len(token_ids))
    return seq


def references(cache):
    return [(block.ref_count, block.key) for block in cache.pool.blocks()]


class TestMemory:
    def test_blocks_for_a_number_of_bytes_are_rounded_down(self):
        layout = layout_of(None, 8)
        assert KVCache.num_blocks_for(layout, 10 * layout.block_bytes + 1) == 10

    def test_a_pool_without_a_usable_block_is_refused(self):
        layout = layout_of(None)
        with pytest.raises(ValueError, match="kv_cache_bytes"):
            KVCache.num_blocks_for(layout, 2 * layout.block_bytes - 1)


class TestAllocate:
    def test_tables_of_all_groups_grow_to_hold_the_tokens(self):
        cache = KVCache(layout_of(None, 6), 20)
        seq = cache.begin()
        for num_tokens, num_blocks in ((1, 1), (4, 1), (5, 2), (3, 2), (16, 4)):
            assert cache.allocate(seq, num_tokens)
            assert seq.num_blocks == num_blocks
        assert cache.num_free == 19 - 8

    def test_it_is_all_or_nothing(self):
        cache = KVCache(layout_of(None, 6), 6)
        seq = cache.begin()
        assert cache.allocate(seq, 8)
        before = references(cache), held(seq)
        assert not cache.allocate(seq, 9)
        assert (references(cache), held(seq)) == before
        cache.pool.check()

    def test_what_arrives_from_elsewhere_needs_only_what_survives(self):
        cache = KVCache(layout_of(None, 6), 20)
        seq = cache.begin()
        assert cache.allocate(seq, 17, surviving_from=17)
        assert held(seq) == [[0, 1, 2, 3, 4], [3, 4]]  # the query at 17 sees 12..17
        assert cache.num_free == 19 - 7
        assert [len(row) for row in seq.rows()] == [5, 5]

    def test_hit_blocks_behind_the_window_are_given_back_before_the_rest_is_taken(self):
        cache = KVCache(layout_of(None, 6), 20)
        prompt = list(range(40))
        cache.free(computed(cache, prompt[:16]))
        hit = cache.match(hashes(prompt), 39)
        assert hit.num_tokens == 16
        seq = cache.begin(hit)
        assert held(seq) == [[0, 1, 2, 3], [2, 3]]
        assert cache.allocate(seq, 40, surviving_from=40)
        assert held(seq) == [list(range(10)), [8, 9]]
        assert cache.num_free == 19 - 12
        cache.pool.check()


class TestWindow:
    def test_blocks_go_once_no_later_query_sees_them(self):
        cache = KVCache(layout_of(None, 4), 20)
        seq = cache.begin()
        assert cache.allocate(seq, 12)
        kept = []
        for num_computed in range(1, 12):
            cache.free_out_of_window(seq, num_computed)
            kept.append(held(seq)[1][0])
        # W = 4: at 7 computed tokens the next query, 7, sees 4..7.
        assert kept == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2]
        assert held(seq)[0] == [0, 1, 2]

    def test_the_tail_of_what_a_window_passed_is_evicted_first(self):
        cache = KVCache(layout_of(4), 5)
        seq = computed(cache, list(range(16)))
        passed = seq.tables[0][:3]
        cache.free_out_of_window(seq, 16)
        assert cache.pool.allocate(3) == passed[::-1]


class TestPrefixReuse:
    def test_a_second_sequence_shares_the_full_blocks_of_the_first(self):
        cache = KVCache(layout_of(None), 20)
        prompt = list(range(10))
        first = computed(cache, prompt)
        second = cache.begin(cache.match(hashes(prompt), 9))
        assert second.tables[0] == first.tables[0][:2]
        assert [block.ref_count for block in second.tables[0]] == [2, 2]
        cache.free(first)
        assert cache.num_free == 19 - 2

    def test_a_hit_of_all_groups_is_held_before_any_allocation_can_evict_it(self):
        cache = KVCache(layout_of(None, 9), 7)
        prompt = list(range(12))
        cache.free(computed(cache, prompt))
        hit = cache.match(hashes(prompt), 11)
        seq = cache.begin(hit)
        assert cache.allocate(seq, 12)  # takes the two blocks of ordinal 2, and none of the hit
        assert all(block.key is not None for table in seq.tables for block in table[:2])
        assert cache.num_free == 0
        cache.pool.check()

    def test_beginning_with_an_evicted_hit_is_a_bug(self):
        cache = KVCache(layout_of(None), 3)
        cache.free(computed(cache, list(range(8))))
        hit = cache.match(hashes(list(range(8))), 8)
        cache.pool.allocate(2)
        with pytest.raises(AssertionError, match="evicted"):
            cache.begin(hit)

    def test_only_full_computed_blocks_are_registered_each_once(self):
        cache = KVCache(layout_of(None), 20)
        tokens = list(range(11))
        seq = cache.begin()
        assert cache.allocate(seq, 11)
        for num_computed, num_cached in ((3, 0), (4, 1), (7, 1), (11, 2), (11, 2)):
            cache.register(seq, hashes(tokens), num_computed)
            assert len(cache.pool.cached_keys()) == seq.num_registered == num_cached

    def test_blocks_that_a_window_passed_are_not_registered(self):
        cache = KVCache(layout_of(None, 4), 20)
        tokens = list(range(12))
        seq = cache.begin()
        assert cache.allocate(seq, 12, surviving_from=12)
        cache.register(seq, hashes(tokens), 12)
        assert len(cache.pool.cached_keys()) == 3 + 1
        assert cache.pool.null_block.key is None

    def test_nothing_is_found_without_caching(self):
        cache = KVCache(layout_of(None), 20, enable_caching=False)
        cache.free(computed(cache, list(range(8))))
        assert cache.match(hashes(list(range(8))), 8).num_tokens == 0


class TestFree:
    def test_eviction_goes_from_the_tail_of_the_first_freed_to_the_head_of_the_last(self):
        cache = KVCache(layout_of(None), 7)
        first, second = computed(cache, list(range(12))), computed(cache, list(range(100, 112)))
        chains = first.tables[0][:], second.tables[0][:]
        cache.free(first)
        cache.free(second)
        assert cache.pool.allocate(6) == chains[0][::-1] + chains[1][::-1]

    def test_the_prefix_that_remains_can_be_hit_in_all_groups(self):
        cache = KVCache(layout_of(None, 9), 9)
        tokens = list(range(16))
        cache.free(computed(cache, tokens))
        cache.pool.allocate(4)
        assert cache.match(hashes(tokens), 16).num_tokens == 8

    def test_a_second_time_does_nothing(self):
        cache = KVCache(layout_of(None, 6), 20)
        prompt = list(range(10))
        first = computed(cache, prompt)
        second = cache.begin(cache.match(hashes(prompt), 9))
        cache.free(second)
        before = references(cache)
        cache.free(second)
        assert references(cache) == before
        cache.free(first)
        assert cache.num_free == 19

    def test_a_freed_sequence_cannot_grow(self):
        cache = KVCache(layout_of(None), 20)
        seq = cache.begin()
        cache.free(seq)
        with pytest.raises(AssertionError):
            cache.allocate(seq, 4)


class TestFork:
    def test_full_blocks_are_shared_and_the_partial_one_is_copied(self):
        cache = KVCache(layout_of(None, 6), 20)
        parent = cache.begin()
        assert cache.allocate(parent, 14)
        cache.free_out_of_window(parent, 10)
        cache.kv[:] = torch.arange(20.0).view(1, 20, 1, 1, 1, 1)
        child = cache.fork(parent, 10)
        assert held(child) == [[0, 1, 2], [1, 2]]
        for table, original in zip(child.tables, parent.tables, strict=True):
            assert table[:2] == original[:2]
            assert table[2] is not original[2]
            assert torch.equal(cache.kv[:, table[2].block_id], cache.kv[:, original[2].block_id])
        cache.free(parent)
        assert cache.num_free == 19 - 5
        cache.free(child)
        assert cache.num_free == 19

    def test_on_a_block_boundary_nothing_is_copied(self):
        cache = KVCache(layout_of(None, 6), 20)
        parent = computed(cache, list(range(8)))
        free_before = cache.num_free
        assert cache.fork_blocks_needed(8) == 0
        child = cache.fork(parent, 8)
        assert child.tables == parent.tables
        assert cache.num_free == free_before

    def test_without_a_block_for_the_copy_there_is_no_fork(self):
        cache = KVCache(layout_of(None, 6), 6)
        parent = computed(cache, list(range(7)))
        assert cache.fork_blocks_needed(7) == 2
        before = references(cache)
        assert cache.fork(parent, 7) is None
        assert references(cache) == before

    def test_a_reserved_tail_makes_a_fork_that_cannot_fail(self):
        cache = KVCache(layout_of(None, 6), 9)
        parent = cache.begin()
        assert cache.allocate(parent, 7)
        tails = cache.reserve_tails(2, 7)
        assert cache.num_free == 0
        children = [cache.fork(parent, 7, tail) for tail in tails]
        assert [[table[1] for table in child.tables] for child in children] == tails
        for seq in (parent, *children):
            cache.free(seq)
        assert cache.num_free == 8
        cache.pool.check()

    def test_tails_are_reserved_all_or_none(self):
        cache = KVCache(layout_of(None, 6), 9)
        assert cache.reserve_tails(5, 7) is None
        assert cache.num_free == 8

    def test_tails_on_a_block_boundary_are_empty(self):
        cache = KVCache(layout_of(None, 6), 9)
        parent = computed(cache, list(range(8)))
        tails = cache.reserve_tails(2, 8)
        assert tails == [[], []]
        assert cache.fork(parent, 8, tails[0]).tables == parent.tables

    def test_unused_tails_are_given_back(self):
        cache = KVCache(layout_of(None, 6), 9)
        cache.free_tails(cache.reserve_tails(3, 7))
        assert cache.num_free == 8
        cache.pool.check()

    def test_a_tail_for_another_length_is_a_bug(self):
        cache = KVCache(layout_of(None), 9)
        parent = computed(cache, list(range(8)))
        with pytest.raises(AssertionError, match="another number of tokens"):
            cache.fork(parent, 8, cache.reserve_tails(1, 7)[0])

    def test_a_child_registers_its_own_blocks_only(self):
        cache = KVCache(layout_of(None), 20)
        tokens = list(range(16))
        parent = computed(cache, tokens[:8])
        child = cache.fork(parent, 8)
        assert cache.allocate(child, 12)
        cache.register(child, hashes(tokens), 12)
        assert cache.match(hashes(tokens), 16).num_tokens == 12


class TestPoison:
    def test_handed_out_and_uncached_free_blocks_hold_nan(self):
        cache = KVCache(layout_of(None), 4, poison=True)
        assert cache.kv.isnan().all()
        seq = cache.begin()
        assert cache.allocate(seq, 8)
        cache.kv[:, [block.block_id for block in seq.tables[0]]] = 1.0
        cache.register(seq, hashes(list(range(8))), 4)
        cached, uncached = (block.block_id for block in seq.tables[0])
        cache.free(seq)
        assert cache.kv[:, uncached].isnan().all()
        assert (cache.kv[:, cached] == 1.0).all()
        assert cache.allocate(cache.begin(), 12)
        assert cache.kv[:, cached].isnan().all()


class TestSizing:
    def test_full_attention_takes_every_block(self):
        cache = KVCache(layout_of(None), 20)
        assert [cache.blocks_needed(n, chunk_tokens=None) for n in (1, 4, 5, 40)] == [1, 1, 2, 10]
        assert [cache.blocks_needed(n, chunk_tokens=8) for n in (1, 4, 5, 40)] == [1, 1, 2, 10]

    def test_a_window_takes_what_survives_or_what_a_chunk_and_its_window_span(self):
        cache = KVCache(layout_of(6), 20)
        assert cache.blocks_needed(17, chunk_tokens=None) == 2
        assert cache.blocks_needed(100, chunk_tokens=8) == 5  # cdiv(5 + 8, 4) + 1
        assert cache.blocks_needed(8, chunk_tokens=8) == 2

    def test_hit_blocks_cost_something_only_while_nobody_holds_them(self):
        cache = KVCache(layout_of(None), 20)
        prompt = list(range(12))
        seq = computed(cache, prompt)
        hit = cache.match(hashes(prompt), 8)
        assert cache.blocks_needed(12, hit, chunk_tokens=None) == 1
        cache.free(seq)
        assert cache.blocks_needed(12, hit, chunk_tokens=None) == 3

    @pytest.mark.parametrize(
        ("windows", "chunk_tokens", "expected"),
        [
            ((None,), 1, 19 * BLOCK_SIZE),
            ((None, None), 1, 9 * BLOCK_SIZE),
            ((6,), 1, 1000),  # 3 blocks at most, however long
            ((6,), 64, 1000),  # cdiv(5 + 64, 4) + 1 = 19 blocks
            ((6,), 72, 19 * BLOCK_SIZE),
            ((None, 6), 1, 16 * BLOCK_SIZE),
            ((None, 6), 8, 14 * BLOCK_SIZE),
        ],
    )
    def test_the_longest_sequence_is_bounded_by_the_same_formula(self, windows, chunk_tokens, expected):
        cache = KVCache(layout_of(*windows), 20)
        longest = cache.max_sequence_tokens(1000, chunk_tokens=chunk_tokens)
        assert longest == expected
        assert cache.blocks_needed(longest, chunk_tokens=chunk_tokens) <= cache.pool.num_usable
        if longest < 1000:
            assert cache.blocks_needed(longest + 1, chunk_tokens=chunk_tokens) > cache.pool.num_usable


windows_of_groups = st.lists(st.none() | st.integers(1, 14), min_size=1, max_size=3)


def cache_with_history(windows, num_cached, num_shared):
    """A cache that knows the prompt's first `num_cached` tokens, the first `num_shared` of them held by a sequence."""
    cache = KVCache(layout_of(*windows), 200)
    cache.free(computed(cache, list(range(num_cached))))
    holder = cache.begin(cache.match(hashes(list(range(num_shared))), num_shared))
    return cache, holder


@settings(max_examples=150)
@given(windows_of_groups, st.integers(0, 40), st.integers(0, 40), st.integers(1, 60))
def test_a_reservation_for_arriving_tokens_takes_exactly_what_was_said(windows, num_cached, num_shared, num_tokens):
    cache, _ = cache_with_history(windows, num_cached, num_shared)
    hit = cache.match(hashes(list(range(num_tokens))), num_tokens - 1)
    needed = cache.blocks_needed(num_tokens, hit, chunk_tokens=None)
    free_before = cache.num_free
    seq = cache.begin(hit)
    assert cache.allocate(seq, num_tokens, surviving_from=num_tokens)
    assert free_before - cache.num_free == needed
    cache.pool.check()


@settings(max_examples=150)
@given(windows_of_groups, st.integers(0, 40), st.integers(0, 40), st.integers(1, 60), st.integers(1, 13))
def test_computing_in_chunks_never_holds_more_than_was_said(windows, num_cached, num_shared, num_tokens, chunk_tokens):
    cache, _ = cache_with_history(windows, num_cached, num_shared)
    hit = cache.match(hashes(list(range(num_tokens))), num_tokens - 1)
    needed = cache.blocks_needed(num_tokens, hit, chunk_tokens=chunk_tokens)
    free_before = cache.num_free
    seq = cache.begin(hit)
    assert free_before - cache.num_free <= needed
    num_computed = hit.num_tokens
    while num_computed < num_tokens:
        cache.free_out_of_window(seq, num_computed)
        num_computed = min(num_computed + chunk_tokens, num_tokens)
        assert cache.allocate(seq, num_computed)
        assert free_before - cache.num_free <= needed


def test_rows_are_ready_for_a_kernel():
    cache = KVCache(layout_of(None, 4), 20)
    seq = cache.begin()
    assert cache.allocate(seq, 12)
    cache.free_out_of_window(seq, 8)
    full, sliding = seq.rows()
    assert full.tolist() == [1, 2, 3]
    assert sliding.tolist() == [0, 5, 6]
    assert full.dtype == sliding.dtype == np.int32
