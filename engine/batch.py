"""A step's work, flattened to what the model and attention read.

A worker describes its work as `BatchItem`s, or keeps `engine.decode_rows.DecodeRows` for what decodes; both become
`Parts`, the parts of a step its `Batch` on the host, and that the `BatchTensors` of a device. All of it happens on the
engine's thread.
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
from engine.staging import Array, to_device

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
class BatchTensors:
    """Items flattened to one row of T tokens, on the device that computes them.

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
class Batch:
    """The same on the host, as `BatchTensors` says; and which tokens only the device knows so far.

    Attributes:
        tables: for each group int32 [S, max_blocks].
        slots: for each group int64 [T]; where keys and values of the tokens go.
        sources: int64 [T]; where the device finds a token among those that it chose in the step before, below 0 for
            those that `token_ids` has; None where it has all.
    """

    token_ids: Int64s
    positions: Int64s
    cu_seqlens_q: Int32s
    seq_lens: Int32s
    tables: tuple[Int32s, ...]
    slots: tuple[Int64s, ...]
    logit_rows: Int64s
    max_query_len: int
    max_seq_len: int
    sources: Int64s | None = None

    @property
    def is_decode(self) -> bool:
        """Whether it is one token of each of its items, with its logits."""
        return self.max_query_len == 1 and len(self.logit_rows) == len(self.seq_lens)

    @property
    def arrays(self) -> list[Array]:
        """What travels to the device, `sources` aside; `tensors` takes it there."""
        columns: list[Array] = [self.token_ids, self.positions, self.cu_seqlens_q, self.seq_lens, self.logit_rows]
        return [*columns, *self.tables, *self.slots]

    def tensors(self, arrays: Sequence[torch.Tensor]) -> BatchTensors:
        """The batch of tensors that have the content of `arrays`."""
        token_ids, positions, cu_seqlens_q, seq_lens, logit_rows, *rest = arrays
        tables, slots = rest[: len(self.tables)], rest[len(self.tables) :]
        return BatchTensors(
            token_ids=token_ids,
            positions=positions,
            cu_seqlens_q=cu_seqlens_q,
            seq_lens=seq_lens,
            groups=tuple(map(GroupMetadata, tables, slots)),
            logit_rows=logit_rows,
            max_query_len=self.max_query_len,
            max_seq_len=self.max_seq_len,
        )

    def on(self, device: torch.device, chosen: torch.Tensor | None = None) -> BatchTensors:
        """The batch on `device`, without waiting for it.

        Args:
            chosen: int64, on `device`; the tokens that `sources` speaks of.
        """
        if self.sources is None:
            return self.tensors(to_device(self.arrays, device))
        *arrays, sources = to_device([*self.arrays, self.sources], device)
        assert chosen is not None
        take_chosen(arrays[0], sources, chosen)
        return self.tensors(arrays)


def take_chosen(token_ids: torch.Tensor, sources: torch.Tensor, chosen: torch.Tensor) -> None:
    """Fills in, in place, the tokens [T] that have a source in `chosen`; all int64 and on one device."""
    token_ids.copy_(torch.where(sources < 0, token_ids, chosen[sources.clamp(min=0)]))


@dataclasses.dataclass(frozen=True, slots=True)
class Parts:
    """Items in columns, S of them with T tokens together.

    Attributes:
        token_ids: int64 [T]; the items' tokens, one item after the other.
        starts, lengths, num_logits: int64 [S]; as of a `BatchItem`.
        tables: for each group int32 [S, blocks]; an item's row is null beyond the blocks of its own context.
        sources: int64 [T] as of a `Batch`; None where all tokens are known.
    """

    token_ids: Int64s
    starts: Int64s
    lengths: Int64s
    num_logits: Int64s
    tables: tuple[Int32s, ...]
    sources: Int64s | None = None


def build_batch(items: Sequence[BatchItem], layout: KVLayout) -> Batch:
    """Flatten items; Python touches each item and block row, numpy each token."""
    return assemble([parts_of(items, layout)], layout)


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


def assemble(parts: Sequence[Parts], layout: KVLayout) -> Batch:
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
        token_ids=whole.token_ids,
        positions=positions,
        cu_seqlens_q=cu_seqlens.astype(np.int32),
        seq_lens=seq_lens.astype(np.int32),
        tables=whole.tables,
        slots=tuple(_slots(table, owners, ordinals, offsets, layout.block_size) for table in whole.tables),
        logit_rows=_last_rows(cu_seqlens[1:], whole.num_logits),
        max_query_len=int(lengths.max()),
        max_seq_len=int(seq_lens.max()),
        sources=whole.sources,
    )


def _joined(parts: Sequence[Parts]) -> Parts:
    return Parts(
        token_ids=np.concatenate([part.token_ids for part in parts]),
        starts=np.concatenate([part.starts for part in parts]),
        lengths=np.concatenate([part.lengths for part in parts]),
        num_logits=np.concatenate([part.num_logits for part in parts]),
        tables=tuple(_stacked(tables) for tables in zip(*(part.tables for part in parts), strict=True)),
        sources=_joined_sources(parts),
    )


def _joined_sources(parts: Sequence[Parts]) -> Int64s | None:
    if all(part.sources is None for part in parts):
        return None
    return np.concatenate(
        [np.full(len(part.token_ids), -1) if part.sources is None else part.sources for part in parts]
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


def _slots(table: Int32s, owners: Int64s, ordinals: Int64s, offsets: Int64s, block_size: int) -> Int64s:
    """Look each token's slot up in a group's block table."""
    blocks = table[owners, ordinals].astype(np.int64)
    assert (blocks != NULL_BLOCK).all(), "a token would be written to the null block"
    return blocks * block_size + offsets


def _last_rows(ends: Int64s, counts: Int64s) -> Int64s:
    """Indices of the last counts[s] tokens before ends[s], for each s in turn."""
    filled = np.cumsum(counts)
    return np.arange(int(filled[-1])) + np.repeat(ends - filled, counts)
