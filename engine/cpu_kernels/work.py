"""What the backend calls: storing a step's keys and values, cutting a step into work items, and doing them."""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from engine.cpu_kernels.arithmetic import FloatArray, IntArray, PageArray
from engine.cpu_kernels.compiling import kernel, parallel_kernel
from engine.cpu_kernels.decode import decode
from engine.cpu_kernels.prefill import MAX_ROWS, prefill
from engine.cpu_kernels.rule import Rule


class Work(NamedTuple):
    """One step of a ragged batch.

    Attributes:
        items: of `plan`; each is to be done for each key/value head.
        tables, cu_seqlens_q, seq_lens: as in `AttentionContext`.
    """

    items: IntArray
    tables: IntArray
    cu_seqlens_q: IntArray
    seq_lens: IntArray


@kernel
def write(key: PageArray, value: PageArray, pages: PageArray, slots: npt.NDArray[np.int64]) -> None:
    """Copy key, value [T, Hkv, D] to slots [T] of pages [num_blocks, 2, Hkv, B, D], all of one dtype."""
    num_kv_heads, block_size, head_dim = pages.shape[2], pages.shape[3], pages.shape[4]
    for token in range(slots.shape[0]):
        block, offset = slots[token] // block_size, slots[token] % block_size
        for head in range(num_kv_heads):
            for d in range(head_dim):
                pages[block, 0, head, offset, d] = key[token, head, d]
                pages[block, 1, head, offset, d] = value[token, head, d]


@kernel
def plan(cu_seqlens_q: IntArray, group_size: int) -> IntArray:
    """Work items [n, 2]: (sequence, first of at most MAX_ROWS rows' query tokens, counted within the sequence)."""
    num_tokens = max(1, MAX_ROWS // group_size)
    count = 0
    for sequence in range(cu_seqlens_q.shape[0] - 1):
        count += (cu_seqlens_q[sequence + 1] - cu_seqlens_q[sequence] + num_tokens - 1) // num_tokens
    items = np.empty((count, 2), np.int32)
    item = 0
    for sequence in range(cu_seqlens_q.shape[0] - 1):
        for first in range(0, cu_seqlens_q[sequence + 1] - cu_seqlens_q[sequence], num_tokens):
            items[item, 0] = sequence
            items[item, 1] = first
            item += 1
    return items


@kernel
def attend_item(index: int, work: Work, query: FloatArray, pages: PageArray, rule: Rule, out: FloatArray) -> None:
    """One work item for one key/value head."""
    num_kv_heads = pages.shape[2]
    head = index % num_kv_heads
    sequence, first = work.items[index // num_kv_heads]
    row_start, row_stop = work.cu_seqlens_q[sequence], work.cu_seqlens_q[sequence + 1]
    length, table = work.seq_lens[sequence], work.tables[sequence]
    if row_stop - row_start == 1:
        decode(query[row_start], pages, table, head, length, rule, out[row_start])
        return
    num_tokens = min(max(1, MAX_ROWS * num_kv_heads // query.shape[1]), row_stop - row_start - first)
    tokens = slice(row_start + first, row_start + first + num_tokens)
    start = length - (row_stop - row_start) + first
    prefill(query[tokens], pages, table, head, start, rule, out[tokens])


@parallel_kernel
def attend(work: Work, query: FloatArray, pages: PageArray, rule: Rule, out: FloatArray) -> None:
    """All of the work.

    Args:
        query, out: float32 [T, Hq, D].
        pages: [num_blocks, 2, Hkv, B, D].
    """
    for index in numba.prange(work.items.shape[0] * pages.shape[2]):
        attend_item(index, work, query, pages, rule, out)
