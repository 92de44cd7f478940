"""One decoder layer of the Llama shape as one kernel: norms, products, rotation, storing of keys and values, attention.

The layer goes through seven stages. In each, threads take shares of the work until none is left; the next starts when
all are done. What follows a product of one share (rotation, the gate, the residual) is done to its tile while that lies
in the first-level cache.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from engine.cpu_kernels.arithmetic import FloatArray, PageArray
from engine.cpu_kernels.compiling import kernel, parallel_kernel
from engine.cpu_kernels.elementwise import narrow, rms_norm, rotate_head, silu_multiply
from engine.cpu_kernels.pointers import call
from engine.cpu_kernels.product import BLOCK_ROWS, PANEL_COLUMNS, SHARE_PANELS, multiply, num_shares, share_at
from engine.cpu_kernels.rule import Rule
from engine.cpu_kernels.shares import next_share
from engine.cpu_kernels.work import Work, attend_item

_NORM_ROWS = 16
# Counters of the stages, each on a cache line of its own.
_NUM_STAGES = 7
_ATTENTION_STAGE = 2
_STRIDE = 8

Counters = npt.NDArray[np.int64]


class LayerWeights(NamedTuple):
    """A layer's weights; flat, since numba cannot hand nested tuples to threads.

    Attributes:
        input_norm, mlp_norm: float32 [H].
        query_norm, key_norm: float32 [D], or [0] for none.
        epsilons: float32 [3]; of the layer's input, of heads, and of the MLP's input.
        qkv: panels of the heads of queries, keys and values in this order, each padded to whole panels.
        output, gate, up, down: panels; of all panels, biases with the same name. See `product.pack`.
    """

    input_norm: FloatArray
    query_norm: FloatArray
    key_norm: FloatArray
    mlp_norm: FloatArray
    epsilons: FloatArray
    qkv: PageArray
    qkv_bias: FloatArray
    output: PageArray
    output_bias: FloatArray
    gate: PageArray
    gate_bias: FloatArray
    up: PageArray
    up_bias: FloatArray
    down: PageArray
    down_bias: FloatArray


class Tokens(NamedTuple):
    """The step's tokens.

    Attributes:
        cosine, sine: float32 [T, D], of their positions.
        slots: int64 [T]; where their keys and values go.
    """

    cosine: FloatArray
    sine: FloatArray
    slots: npt.NDArray[np.int64]


class Buffers(NamedTuple):
    """What stages hand on, reused by all layers: float32.

    Attributes:
        normed: [T, H].
        query, attended: [T, Hq, D].
        gated: [T, I].
    """

    normed: FloatArray
    query: FloatArray
    attended: FloatArray
    gated: FloatArray


@kernel
def _normalize(
    counters: Counters, stage: int, x: FloatArray, weight: FloatArray, epsilon: np.float32, out: FloatArray
) -> None:
    first = next_share(counters, stage * _STRIDE) * _NORM_ROWS
    while first < x.shape[0]:
        last = min(first + _NORM_ROWS, x.shape[0])
        rms_norm(x[first:last], weight, epsilon, out[first:last])
        first = next_share(counters, stage * _STRIDE) * _NORM_ROWS


@kernel
def _project(
    counters: Counters,
    stage: int,
    normed: FloatArray,
    weights: LayerWeights,
    tokens: Tokens,
    pages: PageArray,
    query: FloatArray,
) -> None:
    """Queries to `query`, keys and values to their slots; a share is one head of some rows."""
    num_heads, num_kv_heads, head_dim = query.shape[1], pages.shape[2], query.shape[2]
    block_size, num_rows = pages.shape[3], tokens.slots.shape[0]
    head_panels = (head_dim + PANEL_COLUMNS - 1) // PANEL_COLUMNS
    all_heads = num_heads + 2 * num_kv_heads
    tile = np.empty((min(BLOCK_ROWS, num_rows), head_panels * PANEL_COLUMNS), np.float32)
    total = all_heads * ((num_rows + BLOCK_ROWS - 1) // BLOCK_ROWS)
    share = next_share(counters, stage * _STRIDE)
    while share < total:
        first, head = share // all_heads * BLOCK_ROWS, share % all_heads
        count = min(BLOCK_ROWS, num_rows - first)
        multiply(
            normed, first, count, weights.qkv, weights.qkv_bias, head * head_panels, (head + 1) * head_panels, tile
        )
        for row in range(count):
            token = first + row
            cosine, sine = tokens.cosine[token], tokens.sine[token]
            if head < num_heads:
                rotate_head(tile[row], 0, cosine, sine, weights.query_norm, weights.epsilons[1], query[token, head])
                continue
            block, offset = tokens.slots[token] // block_size, tokens.slots[token] % block_size
            if head < num_heads + num_kv_heads:
                target = pages[block, 0, head - num_heads, offset]
                rotate_head(tile[row], 0, cosine, sine, weights.key_norm, weights.epsilons[1], target)
            else:
                target = pages[block, 1, head - num_heads - num_kv_heads, offset]
                for d in range(head_dim):
                    target[d] = narrow(tile[row, d], target)
        share = next_share(counters, stage * _STRIDE)


@kernel
def _attend(
    counters: Counters, stage: int, work: Work, query: FloatArray, pages: PageArray, rule: Rule, out: FloatArray
) -> None:
    total = work.items.shape[0] * pages.shape[2]
    share = next_share(counters, stage * _STRIDE)
    while share < total:
        attend_item(share, work, query, pages, rule, out)
        share = next_share(counters, stage * _STRIDE)


@kernel
def _add_product(
    counters: Counters, stage: int, x: FloatArray, panels: PageArray, bias: FloatArray, residual: FloatArray
) -> None:
    """residual += x @ W.T + b."""
    num_rows, num_panels = residual.shape[0], panels.shape[0]
    tile = np.empty((min(BLOCK_ROWS, num_rows), SHARE_PANELS * PANEL_COLUMNS), np.float32)
    total = num_shares(num_rows, num_panels)
    share = next_share(counters, stage * _STRIDE)
    while share < total:
        first, count, first_panel, last_panel = share_at(share, num_rows, num_panels)
        multiply(x, first, count, panels, bias, first_panel, last_panel, tile)
        start = first_panel * PANEL_COLUMNS
        for row in range(count):
            for column in range(min(last_panel * PANEL_COLUMNS, residual.shape[1]) - start):
                residual[first + row, start + column] += tile[row, column]
        share = next_share(counters, stage * _STRIDE)


@kernel
def _gate(counters: Counters, stage: int, normed: FloatArray, weights: LayerWeights, out: FloatArray) -> None:
    """out = silu(normed @ gate.T) * (normed @ up.T)."""
    num_rows, num_panels = out.shape[0], weights.gate.shape[0]
    shape = (min(BLOCK_ROWS, num_rows), SHARE_PANELS * PANEL_COLUMNS)
    gates, ups = np.empty(shape, np.float32), np.empty(shape, np.float32)
    total = num_shares(num_rows, num_panels)
    share = next_share(counters, stage * _STRIDE)
    while share < total:
        first, count, first_panel, last_panel = share_at(share, num_rows, num_panels)
        multiply(normed, first, count, weights.gate, weights.gate_bias, first_panel, last_panel, gates)
        multiply(normed, first, count, weights.up, weights.up_bias, first_panel, last_panel, ups)
        start, stop = first_panel * PANEL_COLUMNS, min(last_panel * PANEL_COLUMNS, out.shape[1])
        silu_multiply(gates[:count], ups[:count], out[first : first + count, start:stop])
        share = next_share(counters, stage * _STRIDE)


@kernel
def work_on(
    stage: int,
    counters: Counters,
    x: FloatArray,
    weights: LayerWeights,
    tokens: Tokens,
    pages: PageArray,
    work: Work,
    rule: Rule,
    buffers: Buffers,
) -> None:
    """Take shares of a stage until none is left."""
    normed, query, attended, gated = buffers
    if stage == 0:
        _normalize(counters, stage, x, weights.input_norm, weights.epsilons[0], normed)
    elif stage == 1:
        _project(counters, stage, normed, weights, tokens, pages, query)
    elif stage == 2:
        _attend(counters, stage, work, query, pages, rule, attended)
    elif stage == 3:
        flat = attended.reshape(attended.shape[0], attended.shape[1] * attended.shape[2])
        _add_product(counters, stage, flat, weights.output, weights.output_bias, x)
    elif stage == 4:
        _normalize(counters, stage, x, weights.mlp_norm, weights.epsilons[2], normed)
    elif stage == 5:
        _gate(counters, stage, normed, weights, gated)
    else:
        _add_product(counters, stage, gated, weights.down, weights.down_bias, x)


@parallel_kernel
def decoder_layer(
    x: FloatArray,
    weights: LayerWeights,
    tokens: Tokens,
    pages: PageArray,
    rows: npt.NDArray[np.int64],
    only_rows: bool,
    work: Work,
    rule: Rule,
    buffers: Buffers,
    num_threads: int,
    work_on_address: int,
) -> FloatArray:
    """x += attention(norm(x)); x += down(silu(gate) * up)(norm(x)); for the rows whose output is wanted.

    Args:
        x: [T, H]; changed.
        pages: [num_blocks, 2, Hkv, B, D].
        rows: those that are wanted, in their order, where `only_rows`.
        work: attention of the wanted rows.
        buffers: of T rows.

    Returns:
        [R, H], or x itself where all rows are wanted.
    """
    counters = np.zeros(_NUM_STAGES * _STRIDE, np.int64)
    normed, query, attended, gated = buffers
    for stage in range(_NUM_STAGES):
        if only_rows and stage == _ATTENTION_STAGE:
            count = rows.shape[0]
            x, query, attended = x[rows], query[rows], attended[:count]
            normed, gated = normed[:count], gated[:count]
        for _ in numba.prange(num_threads):
            step = Buffers(normed, query, attended, gated)
            call(work_on_address, (stage, counters, x, weights, tokens, pages, work, rule, step))
    return x
