"""A step's work, flattened to the tensors that the model and attention read.

Schedulers make `BatchItem`s; `Batch` is built and used by the model runner, on the engine's thread.
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


def build_batch(items: Sequence[BatchItem], layout: KVLayout, device: torch.device) -> Batch:
    """Flatten items; Python touches each item and block row, numpy each token."""
    assert items, "an empty batch"
    count = len(items)
    lengths = np.fromiter((len(item.token_ids) for item in items), np.int64, count)
    starts = np.fromiter((item.start for item in items), np.int64, count)
    num_logits = np.fromiter((item.num_logits for item in items), np.int64, count)
    assert lengths.min() > 0, "an item without tokens"
    assert (num_logits <= lengths).all(), "logits asked for positions that the step does not compute"
    cu_seqlens = np.zeros(count + 1, np.int64)
    np.cumsum(lengths, out=cu_seqlens[1:])
    total = int(cu_seqlens[-1])
    token_ids = np.fromiter(itertools.chain.from_iterable(item.token_ids for item in items), np.int64, total)
    owners = np.repeat(np.arange(count), lengths)
    positions = np.arange(total) + (starts - cu_seqlens[:-1])[owners]
    seq_lens = starts + lengths
    return Batch(
        token_ids=torch.from_numpy(token_ids).to(device),
        positions=torch.from_numpy(positions).to(device),
        cu_seqlens_q=torch.from_numpy(cu_seqlens.astype(np.int32)).to(device),
        seq_lens=torch.from_numpy(seq_lens.astype(np.int32)).to(device),
        groups=tuple(
            _place([item.tables[group] for item in items], seq_lens, owners, positions, layout.block_size, device)
            for group in range(len(layout.groups))
        ),
        logit_rows=torch.from_numpy(_last_rows(cu_seqlens[1:], num_logits)).to(device),
        max_query_len=int(lengths.max()),
        max_seq_len=int(seq_lens.max()),
    )


def _place(
    rows: Sequence[BlockRow],
    seq_lens: npt.NDArray[np.int64],
    owners: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64],
    block_size: int,
    device: torch.device,
) -> GroupMetadata:
    """Pad one group's block rows to a table and look each token's slot up in it."""
    num_blocks = -(-seq_lens // block_size)
    table = np.full((len(rows), int(num_blocks.max())), NULL_BLOCK, np.int32)
    for index, (row, width) in enumerate(zip(rows, num_blocks.tolist(), strict=True)):
        table[index, :width] = row[:width]
    blocks = table[owners, positions // block_size].astype(np.int64)
    assert (blocks != NULL_BLOCK).all(), "a token would be written to the null block"
    slots = blocks * block_size + positions % block_size
    return GroupMetadata(torch.from_numpy(table).to(device), torch.from_numpy(slots).to(device))


def _last_rows(ends: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Indices of the last counts[s] tokens before ends[s], for each s in turn."""
    filled = np.cumsum(counts)
    return np.arange(int(filled[-1])) + np.repeat(ends - filled, counts)
