"""The block tables of one sequence.

`KVCache` alone changes them, on the engine thread; attention reads `rows`. Tables only grow: where a sliding window has
passed, the null block takes a block's place, so that position // block_size stays the index. All tables of a sequence
are equally long, and in each the null blocks come before all others.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engine.kv.block_pool import Block
from engine.kv.layout import NULL_BLOCK

BlockIds = npt.NDArray[np.int32]

_INITIAL_CAPACITY = 16


class SequenceBlocks:
    """One block table for each group of the layout.

    Attributes:
        tables: for each group, the block of each ordinal.
        num_registered: leading ordinals whose full blocks are registered (or were hits).
        freed: whether the blocks went back to the pool; such a sequence is never used again.
    """

    __slots__ = ("_ids", "freed", "num_registered", "tables")

    def __init__(self, num_groups: int) -> None:
        self.tables: list[list[Block]] = [[] for _ in range(num_groups)]
        self.num_registered = 0
        self.freed = False
        self._ids: list[BlockIds] = [np.full(_INITIAL_CAPACITY, NULL_BLOCK, np.int32) for _ in range(num_groups)]

    @property
    def num_blocks(self) -> int:
        """Ordinals that each table covers."""
        return len(self.tables[0])

    def num_held(self, group: int) -> int:
        """Blocks of a group that are not null."""
        table = self.tables[group]
        return len(table) - bisect.bisect_left(table, True, key=lambda block: not block.is_null)

    def rows(self) -> list[BlockIds]:
        """Block ids of each group: int32 [num_blocks], views that are valid until the sequence next changes."""
        return [ids[: len(table)] for ids, table in zip(self._ids, self.tables, strict=True)]

    def extend(self, group: int, blocks: Sequence[Block]) -> None:
        """Appends blocks to the table of a group. Amortised O(len(blocks))."""
        table = self.tables[group]
        start, end = len(table), len(table) + len(blocks)
        if end > len(self._ids[group]):
            grown = np.full(max(end, 2 * len(self._ids[group])), NULL_BLOCK, np.int32)
            grown[:start] = self._ids[group][:start]
            self._ids[group] = grown
        table.extend(blocks)
        self._ids[group][start:end] = [block.block_id for block in blocks]

    def cut_before(self, group: int, ordinal: int, null_block: Block) -> list[Block]:
        """Puts the null block in place of all blocks before `ordinal`; returns them, last first.

        Each block is visited once in a sequence's life, since the walk ends at the first null block.
        """
        table = self.tables[group]
        cut: list[Block] = []
        for index in range(min(ordinal, len(table)) - 1, -1, -1):
            if table[index].is_null:
                break
            cut.append(table[index])
            table[index] = null_block
            self._ids[group][index] = NULL_BLOCK
        return cut

    def clear(self) -> list[Block]:
        """Empties the tables for good; returns all blocks, last ordinal first, with nulls among them."""
        blocks = [block for row in zip(*map(reversed, self.tables), strict=True) for block in row]
        self.freed = True
        self.tables = [[] for _ in self.tables]
        return blocks
