"""Attention of many query tokens: bound by arithmetic, so tiles of keys and values are widened once for all rows.

A row is one query token of one head of the group; online softmax over tiles as in FlashAttention (Dao et al., 2022).
"""

from __future__ import annotations

import numpy as np

from engine.cpu_kernels.arithmetic import (
    LOWEST,
    ONE,
    ZERO,
    FloatArray,
    IntArray,
    PageArray,
    softmax_step,
    tanh,
    widen,
)
from engine.cpu_kernels.compiling import kernel
from engine.cpu_kernels.register_tile import TILE_COLUMNS, TILE_ROWS, multiply_add
from engine.cpu_kernels.rule import Rule

# Rows of one call at most: their queries and sums fit the second-level cache.
MAX_ROWS = 512
# Keys of one tile: keys and values, widened, fit the first-level cache.
_TILE_KEYS = 64


@kernel
def _load_tile(
    pages: PageArray,
    table: IntArray,
    head: int,
    first: int,
    start: int,
    stop: int,
    keys: FloatArray,
    values: FloatArray,
) -> None:
    """Widen positions from `first` on to keys [D, tile] and values [tile, D]; zeros outside of [start, stop)."""
    block_size, head_dim = pages.shape[3], pages.shape[4]
    for index in range(values.shape[0]):
        position = first + index
        if start <= position < stop:
            block, offset = table[position // block_size], position % block_size
            for d in range(head_dim):
                keys[d, index] = widen(pages[block, 0, head, offset, d])
                values[index, d] = widen(pages[block, 1, head, offset, d])
        else:
            for d in range(head_dim):
                keys[d, index] = ZERO
                values[index, d] = ZERO


@kernel
def _weigh(
    logits: FloatArray,
    first_key: int,
    position: int,
    window: int,
    softcap: np.float32,
    peak: np.float32,
    mass: np.float32,
) -> tuple[np.float32, np.float32, np.float32]:
    """Cap and mask one row of a tile's logits, whose first key is at `first_key`, then take a softmax step."""
    num_keys = logits.shape[0]
    if softcap > ZERO:
        for index in range(num_keys):
            logits[index] = softcap * tanh(logits[index] / softcap)
    for index in range(min(num_keys, position - window + 1 - first_key)):
        logits[index] = LOWEST
    for index in range(max(0, position + 1 - first_key), num_keys):
        logits[index] = LOWEST
    return softmax_step(logits, peak, mass)


@kernel
def prefill(
    query: FloatArray,
    pages: PageArray,
    table: IntArray,
    head: int,
    start: int,
    rule: Rule,
    out: FloatArray,
) -> None:
    """Consecutive query tokens from position `start`: query, out [n, Hq, D]; keys tile by tile, six rows at a time."""
    num_tokens, num_heads, head_dim = query.shape
    group_size = num_heads // pages.shape[2]
    num_rows = num_tokens * group_size
    padded_rows = (num_rows + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
    padded_dim = (head_dim + TILE_COLUMNS - 1) // TILE_COLUMNS * TILE_COLUMNS
    queries = np.zeros((padded_rows, head_dim), np.float32)
    sums = np.zeros((padded_rows, padded_dim), np.float32)
    keys = np.zeros((head_dim, _TILE_KEYS), np.float32)
    values = np.zeros((_TILE_KEYS, padded_dim), np.float32)
    logits = np.zeros((TILE_ROWS, _TILE_KEYS), np.float32)
    peaks = np.empty(num_rows, np.float32)
    masses = np.ones(num_rows, np.float32)
    for row in range(num_rows):
        token, query_head = row // group_size, head * group_size + row % group_size
        peaks[row] = rule.sinks[query_head]
        for d in range(head_dim):
            queries[row, d] = query[token, query_head, d] * rule.scale
    first, end = max(0, start - rule.window + 1), start + num_tokens
    for tile in range(first // _TILE_KEYS * _TILE_KEYS, end, _TILE_KEYS):
        _load_tile(pages, table, head, tile, first, end, keys, values)
        for strip in range(0, num_rows, TILE_ROWS):
            strip_stop = min(strip + TILE_ROWS, num_rows)
            lowest, highest = start + strip // group_size, start + (strip_stop - 1) // group_size
            if tile > highest or tile + _TILE_KEYS <= lowest - rule.window + 1:
                continue
            logits[:] = ZERO
            for column in range(0, _TILE_KEYS, TILE_COLUMNS):
                multiply_add(queries, strip, 0, keys, 0, column, logits, 0, column, head_dim)
            for row in range(strip, strip_stop):
                peaks[row], masses[row], decay = _weigh(
                    logits[row - strip],
                    tile,
                    start + row // group_size,
                    rule.window,
                    rule.softcap,
                    peaks[row],
                    masses[row],
                )
                if decay != ONE:
                    for d in range(head_dim):
                        sums[row, d] *= decay
            for column in range(0, padded_dim, TILE_COLUMNS):
                multiply_add(logits, 0, 0, values, 0, column, sums, strip, column, _TILE_KEYS)
    for row in range(num_rows):
        for d in range(head_dim):
            out[row // group_size, head * group_size + row % group_size, d] = sums[row, d] / masses[row]
