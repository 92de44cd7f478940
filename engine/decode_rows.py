"""What a step of decodes is built from, kept between steps: each sequence's next token, its position and its blocks.

A sequence that takes one token a step changes little: its position moves on by one, its block table once in a block. So
its row is written when it joins and when its blocks change, and a step picks the rows that it computes; nothing is done
for each sequence in Python. A step may be built before the tokens of the last one are known: then the row says where
the device finds its own. Owned by a decode worker's batch, on the engine's thread.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.batch import Int32s, Int64s, Parts
from engine.kv.layout import NULL_BLOCK, KVLayout

_INITIAL_BLOCKS = 64


class DecodeRows:
    """One row for each sequence that decodes. Free rows hold what they last held; nothing reads them.

    Args:
        num_rows: most sequences at a time.
    """

    def __init__(self, layout: KVLayout, num_rows: int) -> None:
        self._block_size = layout.block_size
        self._token_ids = np.zeros(num_rows, np.int64)
        self._positions = np.zeros(num_rows, np.int64)
        self._tables = [np.full((num_rows, _INITIAL_BLOCKS), NULL_BLOCK, np.int32) for _ in layout.groups]
        # Of the step that was launched last: where a row's token is among those that it chooses, -1 once it is told.
        self._sources = np.full(num_rows, -1, np.int64)
        self._num_launched = 0
        self._ones = np.ones(num_rows, np.int64)
        self._free = list(range(num_rows))

    def __len__(self) -> int:
        """Rows that are taken."""
        return len(self._token_ids) - len(self._free)

    def add(self, token_id: int, position: int, tables: Sequence[Int32s]) -> int:
        """A row for a sequence that will compute `token_id` at `position` next.

        Args:
            tables: its block ids for each group, as `SequenceBlocks.rows` gives them.
        """
        row = self._free.pop()
        self._token_ids[row], self._positions[row], self._sources[row] = token_id, position, -1
        self._reserve_width(len(tables[0]))
        for table, blocks in zip(self._tables, tables, strict=True):
            table[row, : len(blocks)] = blocks
            table[row, len(blocks) :] = NULL_BLOCK
        return row

    def set_tables(self, row: int, tables: Sequence[Int32s]) -> None:
        """The blocks of a row's sequence have changed; there are never fewer than before."""
        self._reserve_width(len(tables[0]))
        for table, blocks in zip(self._tables, tables, strict=True):
            table[row, : len(blocks)] = blocks

    def launched(self, rows: Int64s) -> int:
        """A step that computes the tokens of `rows` is on its way, and chooses the next one of each in their order.

        Returns:
            The step's number, for `tell`.
        """
        self._positions[rows] += 1
        self._sources.fill(-1)
        self._sources[rows] = np.arange(len(rows))
        self._num_launched += 1
        return self._num_launched

    def tell(self, step: int, rows: Int64s, token_ids: Sequence[int]) -> None:
        """What a step chose for those of its rows that go on. Steps are told in their order."""
        self._token_ids[rows] = token_ids
        if step == self._num_launched:
            self._sources.fill(-1)

    def remove(self, row: int) -> None:
        """The row's sequence has left."""
        self._free.append(row)

    def pick(self, rows: Int64s) -> Parts:
        """One token of each of `rows`, at least one, with its logits."""
        positions = self._positions[rows]
        width = int(positions.max()) // self._block_size + 1
        ones = self._ones[: len(rows)]
        sources = self._sources[rows]
        return Parts(
            token_ids=self._token_ids[rows],
            starts=positions,
            lengths=ones,
            num_logits=ones,
            tables=tuple(table[:, :width].take(rows, axis=0) for table in self._tables),
            sources=None if sources.max() < 0 else sources,
        )

    def _reserve_width(self, num_blocks: int) -> None:
        if num_blocks > (width := self._tables[0].shape[1]):
            more = max(num_blocks, 2 * width) - width
            self._tables = [np.pad(table, ((0, 0), (0, more)), constant_values=NULL_BLOCK) for table in self._tables]
