"""Block tables grow at the end, and null blocks take the place of what a window has passed."""

import numpy as np

from engine.kv.block_pool import BlockPool
from engine.kv.sequence_blocks import SequenceBlocks


def test_rows_mirror_the_tables_while_they_grow():
    pool = BlockPool(200)
    seq = SequenceBlocks(2)
    for count in (1, 15, 1, 40, 3):
        for group in range(2):
            seq.extend(group, pool.allocate(count))
        for row, table in zip(seq.rows(), seq.tables, strict=True):
            assert row.dtype == np.int32
            assert row.tolist() == [block.block_id for block in table]
    assert seq.num_blocks == 60


def test_cutting_puts_nulls_and_returns_the_blocks_last_first():
    pool = BlockPool(9)
    seq = SequenceBlocks(1)
    blocks = pool.allocate(6)
    seq.extend(0, blocks)
    assert seq.cut_before(0, 2, pool.null_block) == [blocks[1], blocks[0]]
    assert seq.cut_before(0, 2, pool.null_block) == []
    assert seq.cut_before(0, 5, pool.null_block) == [blocks[4], blocks[3], blocks[2]]
    assert seq.cut_before(0, 99, pool.null_block) == [blocks[5]]
    assert seq.rows()[0].tolist() == [0] * 6
    assert seq.num_blocks == 6


def test_clearing_returns_the_last_ordinals_of_all_groups_first():
    pool = BlockPool(9)
    seq = SequenceBlocks(2)
    first, second = pool.allocate(3), pool.allocate(3)
    seq.extend(0, first)
    seq.extend(1, second)
    assert seq.clear() == [first[2], second[2], first[1], second[1], first[0], second[0]]
    assert seq.freed
    assert [row.tolist() for row in seq.rows()] == [[], []]
