"""Full attention needs the whole prefix, a sliding window its last blocks, and all groups must agree."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.kv.block_pool import BlockPool
from engine.kv.layout import KVGroup, KVLayout
from engine.kv.prefix_index import block_key, match_prefix

BLOCK_SIZE = 4


def layout_of(*windows):
    groups = tuple(KVGroup((layer,), window) for layer, window in enumerate(windows))
    return KVLayout(groups, num_kv_heads=1, head_dim=2, block_size=BLOCK_SIZE, dtype=torch.float32)


def hashes(num_blocks):
    return [bytes([ordinal]) * 32 for ordinal in range(num_blocks)]


def pool_with(cached_by_group):
    """A pool in which the given ordinals of each group are cached."""
    pool = BlockPool(2 + sum(map(len, cached_by_group)))
    for group, ordinals in enumerate(cached_by_group):
        for ordinal in ordinals:
            (block,) = pool.allocate(1)
            pool.register(block, block_key(hashes(ordinal + 1)[ordinal], group))
    return pool


def shape(hit):
    """For each group the ordinals that carry a block."""
    return [[ordinal for ordinal, block in enumerate(row) if not block.is_null] for row in hit.blocks]


def test_a_key_is_the_hash_and_the_group_in_big_endian():
    assert block_key(b"\xaa" * 32, 258) == b"\xaa" * 32 + b"\x00\x00\x01\x02"


@pytest.mark.parametrize(
    ("cached", "max_tokens", "expected"),
    [
        ([], 99, 0),
        ([0], 99, 4),
        ([0, 1, 2], 99, 12),
        ([0, 2, 3], 99, 4),  # the first miss ends it
        ([1, 2, 3], 99, 0),
        ([0, 1, 2], 12, 12),
        ([0, 1, 2], 11, 8),  # a limit inside a block is rounded down
        ([0, 1, 2], 3, 0),
        ([0, 1, 2], 0, 0),
        ([0, 1, 2, 3, 4, 5], 99, 24),  # not beyond the hashes
    ],
)
def test_full_attention_hits_from_the_left(cached, max_tokens, expected):
    hit = match_prefix(pool_with([cached]), layout_of(None), hashes(6), max_tokens)
    assert hit.num_tokens == expected
    assert shape(hit) == [list(range(expected // BLOCK_SIZE))]


def test_a_fully_cached_prompt_leaves_a_block_to_compute():
    pool = pool_with([range(4)])
    assert match_prefix(pool, layout_of(None), hashes(4), max_tokens=16 - 1).num_tokens == 12


@pytest.mark.parametrize(
    ("window", "cached", "expected", "held"),
    [
        (9, [0, 1, 2, 3, 4], 20, [3, 4]),  # W - 1 = 8 keys before the next query: two blocks
        (9, [3, 4], 20, [3, 4]),  # earlier blocks need not be there
        (10, [3, 4], 0, []),  # nine keys reach into a third block
        (10, [2, 3, 4], 20, [2, 3, 4]),
        (9, [1, 2, 4], 12, [1, 2]),  # a run must be contiguous; the rightmost one counts
        (9, [0, 2, 4], 4, [0]),  # shorter, but it touches the beginning
        (9, [2, 4], 0, []),
        (2, [4], 20, [4]),
        (1, [], 20, []),  # a token that sees only itself needs no cache at all
    ],
)
def test_a_sliding_window_needs_the_last_blocks_only(window, cached, expected, held):
    hit = match_prefix(pool_with([cached]), layout_of(window), hashes(5), 99)
    assert hit.num_tokens == expected
    assert shape(hit) == [held]
    assert len(hit.blocks[0]) == expected // BLOCK_SIZE


def test_groups_settle_on_a_length_that_suits_all():
    pool = pool_with([range(5), [0, 1, 2, 3]])
    hit = match_prefix(pool, layout_of(None, 5), hashes(5), 99)
    assert hit.num_tokens == 16
    assert shape(hit) == [[0, 1, 2, 3], [3]]


def test_early_window_blocks_that_are_gone_shorten_the_hit_of_full_attention():
    pool = pool_with([range(5), [4]])
    assert match_prefix(pool, layout_of(None, 5), hashes(5), 99).num_tokens == 20
    assert match_prefix(pool, layout_of(None, 5), hashes(3), 99).num_tokens == 0


def test_two_sliding_groups_shorten_each_other_until_both_agree():
    pool = pool_with([range(6), [1, 3, 5], [0, 1, 2, 4]])
    hit = match_prefix(pool, layout_of(None, 5, 5), hashes(6), 99)
    assert hit.num_tokens == 8
    assert shape(hit) == [[0, 1], [1], [1]]


def test_the_same_content_in_another_group_does_not_count():
    pool = pool_with([[], [0, 1]])
    assert match_prefix(pool, layout_of(None), hashes(2), 99).num_tokens == 0


def test_matching_references_nothing():
    pool = pool_with([range(3)])
    before = [block.ref_count for block in pool.blocks()]
    match_prefix(pool, layout_of(None), hashes(3), 99)
    assert [block.ref_count for block in pool.blocks()] == before


@given(
    windows=st.lists(st.none() | st.integers(1, 14), min_size=1, max_size=3),
    cached=st.lists(st.sets(st.integers(0, 7)), min_size=3, max_size=3),
    num_hashes=st.integers(0, 8),
    max_tokens=st.integers(0, 40),
)
def test_the_hit_is_the_longest_prefix_whose_visible_blocks_are_all_cached(windows, cached, num_hashes, max_tokens):
    layout = layout_of(*windows)

    def usable(length):
        """The definition: every key that the query at the end of the prefix sees lies in a cached block."""
        position = length * BLOCK_SIZE
        return all(
            ordinal in cached[index]
            for index, group in enumerate(layout.groups)
            for ordinal in range(group.first_visible(position) // BLOCK_SIZE, length)
        )

    longest = min(num_hashes, max_tokens // BLOCK_SIZE)
    expected = max(length for length in range(longest + 1) if usable(length))
    hit = match_prefix(pool_with(cached), layout, hashes(num_hashes), max_tokens)
    assert hit.num_tokens == expected * BLOCK_SIZE
    for group, row, held in zip(layout.groups, hit.blocks, shape(hit), strict=True):
        assert len(row) == expected
        assert held == list(range(group.first_visible(hit.num_tokens) // BLOCK_SIZE, expected))
    for index, row in enumerate(hit.blocks):
        for block, block_hash in zip(row, hashes(8), strict=False):
            assert block.is_null or block.key == block_key(block_hash, index)
