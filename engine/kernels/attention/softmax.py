"""Online softmax over tiles of keys that lie in pages: the inner loop of `engine.kernels.attention.paged`.

The recurrence is that of Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), over tiles as in
FlashAttention-2 (Dao, 2023). Exponentials have base 2, as the hardware's do: logits are multiplied by log2(e) once,
together with the softmax scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def tanh(x):
    """Saturates rather than overflows: exp2 of a large number is infinite, and 2 / infinity is 0."""
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E)) + 1.0)


@triton.jit
def rows_of_tile(table, page_rows, head_row, start, end, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Where a tile's keys lie, as rows of the pool seen as a matrix [num_blocks * 2 * Hkv * B, D].

    A tile inside one block needs one entry of the table, and its rows follow each other: the compiler sees wide copies.
    """
    positions = start + tl.arange(0, TILE)
    if BLOCK_SIZE % TILE == 0:
        block = tl.load(table + start // BLOCK_SIZE).to(tl.int64)
        rows = block * page_rows + head_row + start % BLOCK_SIZE + tl.arange(0, TILE)
    else:
        blocks = tl.load(table + positions // BLOCK_SIZE, mask=positions < end, other=0).to(tl.int64)
        rows = blocks * page_rows + head_row + positions % BLOCK_SIZE
    return rows


@triton.jit
def attend_tiles(
    accumulator,
    row_max,
    row_sum,
    query,
    pages,
    table,
    num_kv_heads,
    kv_head,
    begin,
    end,
    positions,
    low,
    high,
    window,
    inner_scale,
    outer_scale,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Attend over the keys of positions [begin, end), `begin` a multiple of TILE.

    Args:
        accumulator: float32 [ROWS, DIMS], not normalised.
        row_max, row_sum: float32 [ROWS]; largest logit so far in base 2, and the sum of weights relative to it.
        query: [ROWS, DIMS].
        pages: pointer to the pool's slot, or a descriptor of tiles [TILE, DIMS] of it as a matrix.
        table: the sequence's row of the block tables.
        positions: int32 [ROWS]; of the query in each row.
        low, high: first and last key position that any row sees. Others may be NaN: they are not loaded, or zeroed.
        inner_scale, outer_scale: logits in base 2 are outer * tanh(inner * q.k), or outer * q.k without a cap.
        MASKED: whether some row may not see some key.

    Returns:
        accumulator, row_max, row_sum.
    """
    dims = tl.arange(0, DIMS)
    for start in range(begin, end, TILE):
        key_positions = start + tl.arange(0, TILE)
        wanted = (key_positions >= low) & (key_positions <= high)
        value_rows = num_kv_heads * BLOCK_SIZE
        if DESCRIPTOR:
            block = tl.load(table + start // BLOCK_SIZE)
            row = (block * 2 * num_kv_heads + kv_head) * BLOCK_SIZE + start % BLOCK_SIZE
            keys = pages.load([row, 0])
            values = pages.load([row + value_rows, 0])
            if MASKED:
                values = tl.where(wanted[:, None], values, 0.0)
        else:
            rows = rows_of_tile(table, 2 * value_rows, kv_head * BLOCK_SIZE, start, end, TILE, BLOCK_SIZE)
            elements = pages + rows[:, None] * HEAD_DIM + dims[None, :]
            loaded = (dims < HEAD_DIM)[None, :]
            if MASKED:
                loaded = loaded & wanted[:, None]
            keys = tl.load(elements, mask=loaded, other=0.0)
            values = tl.load(elements + value_rows * HEAD_DIM, mask=loaded, other=0.0)

        scores = tl.dot(query, tl.trans(keys), input_precision="ieee")
        if HAS_SOFTCAP:
            scores = tanh(scores * inner_scale)
        if MASKED:
            visible = key_positions[None, :] <= positions[:, None]
            if HAS_WINDOW:
                visible = visible & (key_positions[None, :] > positions[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))

        # The scale is applied after the mask, next to the subtraction: both then contract to one multiply-add whether
        # or not there is a mask, and a row's bits do not depend on which kind of tile its keys went through.
        new_max = tl.maximum(row_max, tl.max(scores, 1) * outer_scale)
        origin = new_max
        if MASKED:
            # A row that has seen no key yet: exp2(-inf - 0) is 0, exp2(-inf + inf) would be NaN.
            origin = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores * outer_scale - origin[:, None])
        rescale = tl.exp2(row_max - origin)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        accumulator = tl.dot(weights.to(values.dtype), values, accumulator * rescale[:, None], input_precision="ieee")
        row_max = new_max
    return accumulator, row_max, row_sum
