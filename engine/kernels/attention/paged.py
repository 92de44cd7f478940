"""Paged attention for ragged batches: prefill chunks over cached prefixes and decodes, in one launch.

The query heads that share a key/value head are rows of one matrix, so that keys and values are read once for all of
them: a program has TOKENS consecutive tokens of one sequence, times GROUP heads, as its rows. With few programs and
long contexts the keys are split in segments as well, of which each program leaves a partial result for
`engine.kernels.attention.merge` (FlashDecoding, Dao et al., 2023). How many there are is the launch's; where they lie
follows from each context on the device, so that a replayed CUDA graph is right for contexts of any length.
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.attention.softmax import LOG2_E, attend_tiles


@triton.jit
def find_sequence(cu_seqlens_q, num_sequences, query_block, TOKENS: tl.constexpr):
    """The sequence that a block of queries belongs to.

    Sequence s gets the blocks from cu_seqlens_q[s] // TOKENS + s on: as many as it needs, and at most one that stays
    idle. So the grid's size follows from the tokens alone, and no plan has to be copied to the GPU before a launch.
    """
    low = 0
    high = num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_seqlens_q + middle) // TOKENS + middle <= query_block:
            low = middle
        else:
            high = middle
    return low


# What changes from step to step must not make Triton compile a kernel for it.
@triton.jit(do_not_specialize=["num_sequences", "table_stride"])
def paged_attention(
    out,
    partial_out,
    partial_max,
    partial_sum,
    query,
    pages,
    block_tables,
    cu_seqlens_q,
    seq_lens,
    sinks,
    num_sequences,
    table_stride,
    query_token_stride,
    query_head_stride,
    window,
    inner_scale,
    outer_scale,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    DECODE: tl.constexpr,
    SPLIT: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """Grid (blocks of queries, Hkv, segments).

    Args:
        out: [T, Hq, D], contiguous; not written if SPLIT.
        partial_out: float32 [T, Hq, segments, D], not normalised; partial_max, partial_sum: float32 [T, Hq, segments].
            Written if SPLIT. A segment that a row sees nothing of has a maximum of -inf and a sum of 0.
        query: [T, Hq, D], a head's elements next to each other.
        pages: [num_blocks, 2, Hkv, B, D] contiguous, or its descriptor.
        block_tables: int32 [S, max_blocks]; cu_seqlens_q: int32 [S + 1]; seq_lens: int32 [S].
        sinks: [Hq].
        window: tokens.
        inner_scale, outer_scale: as in `attend_tiles`.
        GROUP: Hq / Hkv.
        DIMS: D, rounded up to a power of two.
        DECODE: every sequence has one query.
    """
    TOKENS: tl.constexpr = ROWS // GROUP
    # Of a long chunk the last queries see most keys: they start first, so that none of them runs on alone at the end.
    query_block = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    num_kv_heads = tl.num_programs(1)
    segment = tl.program_id(2)
    if DECODE:
        sequence = query_block
        first_token = 0
    else:
        sequence = find_sequence(cu_seqlens_q, num_sequences, query_block, TOKENS)
        first_token = (query_block - tl.load(cu_seqlens_q + sequence) // TOKENS - sequence) * TOKENS
    query_start = tl.load(cu_seqlens_q + sequence)
    num_queries = tl.load(cu_seqlens_q + sequence + 1) - query_start
    if first_token >= num_queries:
        return
    seq_len = tl.load(seq_lens + sequence)
    table = block_tables + sequence.to(tl.int64) * table_stride

    rows = tl.arange(0, ROWS)
    tokens = first_token + rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    is_row = (rows < TOKENS * GROUP) & (tokens < num_queries)
    first_position = seq_len - num_queries + first_token
    last_position = tl.minimum(first_position + TOKENS, seq_len) - 1
    positions = seq_len - num_queries + tokens

    # Keys [begin, end) are seen by some row, [full_begin, full_end) by every row.
    low = 0
    begin = 0
    if HAS_WINDOW:
        low = tl.maximum(first_position - window + 1, 0)
        begin = low // TILE * TILE
    end = last_position + 1
    if SPLIT:
        segment_tokens = tl.cdiv(end - begin, tl.num_programs(2) * TILE) * TILE
        begin += segment * segment_tokens
        end = tl.minimum(end, begin + segment_tokens)
    full_begin = begin
    if HAS_WINDOW:
        full_begin = tl.maximum(begin, tl.cdiv(tl.maximum(last_position - window + 1, 0), TILE) * TILE)
        full_begin = tl.minimum(full_begin, tl.maximum(end, begin))
    full_end = tl.maximum(full_begin, tl.minimum(first_position + 1, end) // TILE * TILE)

    dims = tl.arange(0, DIMS)
    token_rows = (query_start + tokens).to(tl.int64)
    is_element = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    query_rows = query + token_rows * query_token_stride + heads * query_head_stride
    q = tl.load(query_rows[:, None] + dims[None, :], mask=is_element, other=0.0)

    acc = tl.zeros((ROWS, DIMS), dtype=tl.float32)
    row_max = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros((ROWS,), dtype=tl.float32)
    if HAS_WINDOW:
        acc, row_max, row_sum = attend_tiles(
            acc, row_max, row_sum, q, pages, table, num_kv_heads, kv_head, begin, full_begin, positions, low,
            last_position, window, inner_scale, outer_scale, True, True, HAS_SOFTCAP, DESCRIPTOR, TILE, BLOCK_SIZE,
            HEAD_DIM, DIMS,
        )  # fmt: skip
    acc, row_max, row_sum = attend_tiles(
        acc, row_max, row_sum, q, pages, table, num_kv_heads, kv_head, full_begin, full_end, positions, low,
        last_position, window, inner_scale, outer_scale, False, HAS_WINDOW, HAS_SOFTCAP, DESCRIPTOR, TILE, BLOCK_SIZE,
        HEAD_DIM, DIMS,
    )  # fmt: skip
    acc, row_max, row_sum = attend_tiles(
        acc, row_max, row_sum, q, pages, table, num_kv_heads, kv_head, full_end, end, positions, low,
        last_position, window, inner_scale, outer_scale, True, HAS_WINDOW, HAS_SOFTCAP, DESCRIPTOR, TILE, BLOCK_SIZE,
        HEAD_DIM, DIMS,
    )  # fmt: skip

    out_rows = token_rows * (num_kv_heads * GROUP) + heads
    if SPLIT:
        partial_rows = out_rows * tl.num_programs(2) + segment
        tl.store(partial_max + partial_rows, row_max, mask=is_row)
        tl.store(partial_sum + partial_rows, row_sum, mask=is_row)
        tl.store(partial_out + partial_rows[:, None] * HEAD_DIM + dims[None, :], acc, mask=is_element)
    else:
        if HAS_SINKS:
            sink = tl.load(sinks + heads, mask=is_row, other=0.0).to(tl.float32)
            row_sum += tl.exp2(sink * LOG2_E - row_max)
        # The rows that pad a step see nothing at all.
        result = acc / tl.where(row_sum > 0.0, row_sum, 1.0)[:, None]
        tl.store(out + out_rows[:, None] * HEAD_DIM + dims[None, :], result.to(out.dtype.element_ty), mask=is_element)
