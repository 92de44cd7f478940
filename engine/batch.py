"""A step's work, flattened to the tensors that the model and attention read.

A worker describes its work as `BatchItem`s, or keeps `engine.decode_rows.DecodeRows` for what decodes; both become
`Parts`, and the parts of a step its `Batch`. All of it happens on the engine's thread.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from engine.attention.base import GroupMetadata
from engine.kv.layout import NULL_BLOCK, KVLayout

BlockRow = Sequence[int] | npt.NDArray[np.integer]
Int64s = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]


@dataclasses.dataclass(frozen=True, slots=True)
class BatchItem:
    """Consecutive tokens of one sequence that a step computes.

    Attributes:
        token_ids: the tokens at positions [start, start + len(token_ids)); at least one.
        start: tokens of the sequence whose keys and values lie in the cache already.
        tables: for each group of the layout, the physical block of each block ordinal from 0 on, covering at least
            [0, start + len(token_ids)); blocks that the group's window has passed may be null.
        num_logits: how many of its last positions need logits.
    """

    token_ids: Sequence[int] | npt.NDArray[np.integer]
    start: int
    tables: Sequence[BlockRow]
    num_logits: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """Items flattened to one row of T tokens.

    Attributes:
        token_ids, positions: int64 [T].
        cu_seqlens_q: int32 [S + 1]; item s has the tokens cu_seqlens_q[s] : cu_seqlens_q[s + 1].
        seq_lens: int32 [S]; context of each item, its tokens included.
        groups: block tables and slots of each group of the layout.
        logit_rows: int64 [num_rows]; the tokens that need logits, in the order of the items.
        max_query_len, max_seq_len: largest over the items.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    cu_seqlens_q: torch.Tensor
    seq_lens: torch.Tensor
    groups: tuple[GroupMetadata, ...]
    logit_rows: torch.Tensor
    max_query_len: int
    max_seq_len: int


@dataclasses.dataclass(frozen=True, slots=True)
class Parts:
    """Items in columns, S of them with T tokens together.

    Attributes:
        token_ids: int64 [T]; the items' tokens, one item after the other.
        starts, lengths, num_logits: int64 [S]; as of a `BatchItem`.
        tables: for each group int32 [S, blocks]; an item's row is null beyond the blocks of its own context.
    """

    token_ids: Int64s
    starts: Int64s
    lengths: Int64s
    num_logits: Int64s
    tables: tuple[Int32s, ...]


def build_batch(items: Sequence[BatchItem], layout: KVLayout, device: torch.device) -> Batch:
    """Flatten items; Python touches each item and block row, numpy each token."""
    return assemble([parts_of(items, layout)], layout, device)


def parts_of(items: Sequence[BatchItem], layout: KVLayout) -> Parts:
    """Items, at least one, as columns."""
    assert items, "an empty batch"
    count = len(items)
    lengths = np.fromiter((len(item.token_ids) for item in items), np.int64, count)
    starts = np.fromiter((item.start for item in items), np.int64, count)
    num_blocks = -(-(starts + lengths) // layout.block_size)
    return Parts(
        token_ids=np.fromiter(
            itertools.chain.from_iterable(item.token_ids for item in items), np.int64, int(lengths.sum())
        ),
        starts=starts,
        lengths=lengths,
        num_logits=np.fromiter((item.num_logits for item in items), np.int64, count),
        tables=tuple(
            _padded([item.tables[group] for item in items], num_blocks) for group in range(len(layout.groups))
        ),
    )


def assemble(parts: Sequence[Parts], layout: KVLayout, device: torch.device) -> Batch:
    """The batch of all parts, in their order."""
    whole = parts[0] if len(parts) == 1 else _joined(parts)
    lengths, starts = whole.lengths, whole.starts
    assert lengths.min() > 0, "an item without tokens"
    assert (whole.num_logits <= lengths).all(), "logits asked for positions that the step does not compute"
    cu_seqlens = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=cu_seqlens[1:])
    owners = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.arange(int(cu_seqlens[-1])) + (starts - cu_seqlens[:-1])[owners]
    ordinals, offsets = np.divmod(positions, layout.block_size)
    seq_lens = starts + lengths
    return Batch(
        token_ids=torch.from_numpy(whole.token_ids).to(device),
        positions=torch.from_numpy(positions).to(device),
        cu_seqlens_q=torch.from_numpy(cu_seqlens.astype(np.int32)).to(device),
        seq_lens=torch.from_numpy(seq_lens.astype(np.int32)).to(device),
        groups=tuple(_place(table, owners, ordinals, offsets, layout.block_size, device) for table in whole.tables),
        logit_rows=torch.from_numpy(_last_rows(cu_seqlens[1:], whole.num_logits)).to(device),
        max_query_len=int(lengths.max()),
        max_seq_len=int(seq_lens.max()),
    )


def _joined(parts: Sequence[Parts]) -> Parts:
    return Parts(
        token_ids=np.concatenate([part.token_ids for part in parts]),
        starts=np.concatenate([part.starts for part in parts]),
        lengths=np.concatenate([part.lengths for part in parts]),
        num_logits=np.concatenate([part.num_logits for part in parts]),
        tables=tuple(_stacked(tables) for tables in zip(*(part.tables for part in parts), strict=True)),
    )


def _stacked(tables: Sequence[Int32s]) -> Int32s:
    """Tables below each other, as wide as the widest."""
    stacked = np.full((sum(map(len, tables)), max(table.shape[1] for table in tables)), NULL_BLOCK, np.int32)
    first = 0
    for table in tables:
        stacked[first : first + len(table), : table.shape[1]] = table
        first += len(table)
    return stacked


def _padded(rows: Sequence[BlockRow], num_blocks: Int64s) -> Int32s:
    """The leading `num_blocks` of each row, as a table."""
    table = np.full((len(rows), int(num_blocks.max())), NULL_BLOCK, np.int32)
    for index, (row, width) in enumerate(zip(rows, num_blocks.tolist(), strict=True)):
        table[index, :width] = row[:width]
    return table


def _place(
    table: Int32s, owners: Int64s, ordinals: Int64s, offsets: Int64s, block_size: int, device: torch.device
) -> GroupMetadata:
    """Look each token's slot up in a group's block table."""
    blocks = table[owners, ordinals].astype(np.int64)
    assert (blocks != NULL_BLOCK).all(), "a token would be written to the null block"
    return GroupMetadata(torch.from_numpy(table).to(device), torch.from_numpy(blocks * block_size + offsets).to(device))


def _last_rows(ends: Int64s, counts: Int64s) -> Int64s:
    """Indices of the last counts[s] tokens before ends[s], for each s in turn."""
    filled = np.cumsum(counts)
    return np.arange(int(filled[-1])) + np.repeat(ends - filled, counts)
