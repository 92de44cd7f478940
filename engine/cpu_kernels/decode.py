"""Attention of one query token: bound by memory, so blocks are read in place, two heads of a group at a time."""

from __future__ import annotations

import numpy as np

from engine.cpu_kernels.arithmetic import (
    ZERO,
    FloatArray,
    IntArray,
    PageArray,
    softmax_step,
    tanh,
    widen,
)
from engine.cpu_kernels.compiling import inlined_kernel, kernel
from engine.cpu_kernels.prefetch import prefetch
from engine.cpu_kernels.rule import Rule

# Keys of one pass, about: their logits stay in the first-level cache.
_PASS_KEYS = 512


@inlined_kernel
def _decode_logits(
    queries: FloatArray,
    keys: PageArray,
    ahead: PageArray,
    start: int,
    stop: int,
    softcap: np.float32,
    logits: FloatArray,
    column: int,
) -> None:
    """logits[:, column:] = queries [rows, D] @ keys[start:stop].T of one block [B, D], two rows by four tokens.

    Fetches the block `ahead` as it goes: all at once would keep this one waiting.
    """
    head_dim = queries.shape[1]
    for row in range(0, queries.shape[0], 2):
        token, index = start, column
        while token + 4 <= stop:
            if row == 0:
                prefetch(ahead[token : token + 4])
            a0, a1, a2, a3 = ZERO, ZERO, ZERO, ZERO
            b0, b1, b2, b3 = ZERO, ZERO, ZERO, ZERO
            for d in range(head_dim):
                a, b = queries[row, d], queries[row + 1, d]
                k0, k1 = widen(keys[token, d]), widen(keys[token + 1, d])
                k2, k3 = widen(keys[token + 2, d]), widen(keys[token + 3, d])
                a0 += a * k0
                a1 += a * k1
                a2 += a * k2
                a3 += a * k3
                b0 += b * k0
                b1 += b * k1
                b2 += b * k2
                b3 += b * k3
            logits[row, index], logits[row, index + 1] = a0, a1
            logits[row, index + 2], logits[row, index + 3] = a2, a3
            logits[row + 1, index], logits[row + 1, index + 1] = b0, b1
            logits[row + 1, index + 2], logits[row + 1, index + 3] = b2, b3
            token, index = token + 4, index + 4
        while token < stop:
            a0, b0 = ZERO, ZERO
            for d in range(head_dim):
                k0 = widen(keys[token, d])
                a0 += queries[row, d] * k0
                b0 += queries[row + 1, d] * k0
            logits[row, index], logits[row + 1, index] = a0, b0
            token, index = token + 1, index + 1
    if softcap > ZERO:
        for row in range(queries.shape[0]):
            for index in range(column, column + stop - start):
                logits[row, index] = softcap * tanh(logits[row, index] / softcap)


@inlined_kernel
def _decode_values(
    weights: FloatArray, column: int, values: PageArray, ahead: PageArray, start: int, stop: int, sums: FloatArray
) -> None:
    """sums [rows, D] += weights[:, column:] @ values[start:stop] of one block [B, D], as `_decode_logits` goes."""
    head_dim = sums.shape[1]
    for row in range(0, sums.shape[0], 2):
        token, index = start, column
        while token + 4 <= stop:
            if row == 0:
                prefetch(ahead[token : token + 4])
            a0, a1 = weights[row, index], weights[row, index + 1]
            a2, a3 = weights[row, index + 2], weights[row, index + 3]
            b0, b1 = weights[row + 1, index], weights[row + 1, index + 1]
            b2, b3 = weights[row + 1, index + 2], weights[row + 1, index + 3]
            for d in range(head_dim):
                v0, v1 = widen(values[token, d]), widen(values[token + 1, d])
                v2, v3 = widen(values[token + 2, d]), widen(values[token + 3, d])
                sums[row, d] += a0 * v0 + a1 * v1 + a2 * v2 + a3 * v3
                sums[row + 1, d] += b0 * v0 + b1 * v1 + b2 * v2 + b3 * v3
            token, index = token + 4, index + 4
        while token < stop:
            a0, b0 = weights[row, index], weights[row + 1, index]
            for d in range(head_dim):
                v0 = widen(values[token, d])
                sums[row, d] += a0 * v0
                sums[row + 1, d] += b0 * v0
            token, index = token + 1, index + 1


@kernel
def decode(
    query: FloatArray,
    pages: PageArray,
    table: IntArray,
    head: int,
    length: int,
    rule: Rule,
    out: FloatArray,
) -> None:
    """One query token: query, out [Hq, D] of the heads that share key/value head `head`; context `length`."""
    num_kv_heads, block_size, head_dim = pages.shape[2], pages.shape[3], pages.shape[4]
    group_size = query.shape[0] // num_kv_heads
    # An even number of rows; one too many is a query of zeros.
    num_rows = group_size + group_size % 2
    pass_blocks = max(1, _PASS_KEYS // block_size)
    queries = np.zeros((num_rows, head_dim), np.float32)
    sums = np.zeros((num_rows, head_dim), np.float32)
    logits = np.empty((num_rows, pass_blocks * block_size), np.float32)
    peaks = np.zeros(num_rows, np.float32)
    masses = np.ones(num_rows, np.float32)
    for row in range(group_size):
        peaks[row] = rule.sinks[head * group_size + row]
        for d in range(head_dim):
            queries[row, d] = query[head * group_size + row, d] * rule.scale
    first = max(0, length - rule.window)
    last_block = (length + block_size - 1) // block_size
    for pass_start in range(first // block_size, last_block, pass_blocks):
        pass_stop = min(pass_start + pass_blocks, last_block)
        column = 0
        for ordinal in range(pass_start, pass_stop):
            start, stop = max(0, first - ordinal * block_size), min(block_size, length - ordinal * block_size)
            ahead = pages[table[min(ordinal + 1, last_block - 1)], 0, head]
            _decode_logits(queries, pages[table[ordinal], 0, head], ahead, start, stop, rule.softcap, logits, column)
            column += stop - start
        for row in range(num_rows):
            peaks[row], masses[row], decay = softmax_step(logits[row, :column], peaks[row], masses[row])
            for d in range(head_dim):
                sums[row, d] *= decay
        column = 0
        for ordinal in range(pass_start, pass_stop):
            start, stop = max(0, first - ordinal * block_size), min(block_size, length - ordinal * block_size)
            ahead = pages[table[min(ordinal + 1, last_block - 1)], 1, head]
            _decode_values(logits, column, pages[table[ordinal], 1, head], ahead, start, stop, sums)
            column += stop - start
    for row in range(group_size):
        for d in range(head_dim):
            out[head * group_size + row, d] = sums[row, d] / masses[row]
