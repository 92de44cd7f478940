"""Numba kernels that mask, rank and draw tokens from logits in host memory, one row after the other, without the GIL.

Legend: R rows, V vocabulary. Nothing here assumes finite numbers: grammars exclude tokens with minus infinity, and a
row of NaN gives some token of the vocabulary.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from engine.cpu_kernels.compiling import exact_kernel

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]
Patterns = npt.NDArray[np.int32]

# Weights are in [0, 1]; the bit pattern of 1.0 has 30 bits, read as three digits of 10.
_DIGIT_BITS = 10
_DIGITS = 1 << _DIGIT_BITS
# Elements that are compared at a time, in vector registers.
_STRIDE = 64
# Weights that are summed by themselves, so that finding the drawn one need not visit all.
_CDF_STRIDE = 512


@exact_kernel
def _sift(values: Floats, ids: Ids, at: int, size: int) -> None:
    """Restore the heap below `at`: the worst on top, that is the smallest value, among equals the highest id."""
    value, token_id = values[at], ids[at]
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        other = child + 1
        if other < size and (
            values[other] < values[child] or (values[other] == values[child] and ids[other] > ids[child])
        ):
            child = other
        if value < values[child] or (value == values[child] and token_id > ids[child]):
            break
        values[at], ids[at] = values[child], ids[child]
        at = child
    values[at], ids[at] = value, token_id


@exact_kernel
def _select(row: Floats, values: Floats, ids: Ids) -> None:
    """The len(values) largest of a row, as a heap; among equals the lowest ids."""
    k, size = len(values), len(row)
    for index in range(k):
        values[index] = row[index] if row[index] == row[index] else -np.inf
        ids[index] = index
    for at in range(k // 2 - 1, -1, -1):
        _sift(values, ids, at, k)
    start = k
    while start < size:
        stop = min(start + _STRIDE, size)
        worst = values[0]
        hit = False
        for index in range(start, stop):
            hit |= row[index] > worst
        if hit:
            for index in range(start, stop):
                if row[index] > values[0]:
                    values[0], ids[0] = row[index], index
                    _sift(values, ids, 0, k)
        start = stop


@exact_kernel
def _sort(values: Floats, ids: Ids) -> None:
    """A heap, best first."""
    for last in range(len(values) - 1, 0, -1):
        values[0], values[last] = values[last], values[0]
        ids[0], ids[last] = ids[last], ids[0]
        _sift(values, ids, 0, last)


@exact_kernel
def rank(logits: Floats, values: Floats, ids: Ids) -> None:
    """Fill `values` and `ids` [R, k] with the k largest of each row of `logits` [R, V], as `sampling.ranked` says."""
    for row in range(len(logits)):
        _select(logits[row], values[row], ids[row])
        _sort(values[row], ids[row])


@exact_kernel
def _nucleus(weights: Floats, patterns: Patterns, top_p: float) -> tuple[int, int]:
    """The smallest set of largest weights whose sum is `top_p` of the whole, as (pattern, index).

    It has all weights whose bit pattern is larger than `pattern`, and those of the same up to `index`. Floats from 0 on
    lie in the order of their patterns, so a radix selection finds the smallest weight: three digits, of which all but
    the first look only at what shares the digits before.
    """
    members = np.empty(len(weights), np.int64)
    num_members = len(weights)
    sums = np.empty(_DIGITS, np.float64)
    mass, above, prefix = 0.0, 0.0, 0
    for level in range(3):
        shift = (2 - level) * _DIGIT_BITS
        for digit in range(_DIGITS):
            sums[digit] = 0.0
        if level == 0:
            for index in range(len(weights)):
                # A mask for NaN, whose pattern has more bits.
                sums[(patterns[index] >> shift) & (_DIGITS - 1)] += weights[index]
            for digit in range(_DIGITS):
                mass += top_p * sums[digit]
        else:
            for member in range(num_members):
                index = members[member]
                sums[(patterns[index] >> shift) & (_DIGITS - 1)] += weights[index]
        chosen = -1
        for digit in range(_DIGITS - 1, -1, -1):
            if sums[digit] > 0.0:
                if chosen >= 0:
                    above += sums[chosen]
                chosen = digit
                if above + sums[digit] >= mass:
                    break
        if chosen < 0:
            # Not a number, or all weights are 0.
            return -1, len(weights)
        prefix = (prefix << _DIGIT_BITS) | chosen
        count = 0
        for member in range(num_members):
            index = member if level == 0 else members[member]
            members[count] = index
            count += (patterns[index] >> shift) == prefix
        num_members = count
    # All members are equal: the lowest ids, as many as the mass still lacks.
    lacking = math.ceil((mass - above) / weights[members[0]])
    return prefix, members[min(max(lacking, 1), num_members) - 1]


@exact_kernel
def _draw_weighted(weights: Floats, patterns: Patterns, top_p: float, min_p: float, number: float) -> int:
    """Index of a weight that top-p, then min-p leave; `number` in [0, 1) inverts the distribution in index order."""
    pattern, last = -1, len(weights)
    if top_p < 1.0:
        pattern, last = _nucleus(weights, patterns, top_p)
    num_strides = -(-len(weights) // _CDF_STRIDE)
    sums = np.empty(num_strides, np.float64)
    total = 0.0
    for stride in range(num_strides):
        part = 0.0
        for index in range(stride * _CDF_STRIDE, min((stride + 1) * _CDF_STRIDE, len(weights))):
            kept = (patterns[index] > pattern) | ((patterns[index] == pattern) & (index <= last))
            part += weights[index] if kept & (weights[index] >= min_p) else 0.0
        sums[stride] = part
        total += part
    target = number * total
    before = 0.0
    possible = 0
    for stride in range(num_strides):
        if before + sums[stride] > target or stride == num_strides - 1:
            part = 0.0
            for index in range(stride * _CDF_STRIDE, min((stride + 1) * _CDF_STRIDE, len(weights))):
                kept = (patterns[index] > pattern) | ((patterns[index] == pattern) & (index <= last))
                if kept and weights[index] > 0.0 and weights[index] >= min_p:
                    possible = index
                    part += weights[index]
                    if before + part > target:
                        return index
        before += sums[stride]
    return possible


@exact_kernel
def draw(weights: Floats, top_p: Doubles, min_p: Doubles, numbers: Doubles, token_ids: Ids) -> None:
    """Draw from each row of `weights` [R, V], probabilities relative to the largest, what top-p, then min-p leave.

    Args:
        top_p, min_p, numbers: [R]; numbers in [0, 1).
        token_ids: [R], filled.
    """
    patterns = weights.view(np.int32)
    for row in range(len(weights)):
        token_ids[row] = _draw_weighted(weights[row], patterns[row], top_p[row], min_p[row], numbers[row])


@exact_kernel
def _sort_by_id(ids: Ids, weights: Floats) -> None:
    """Shell's sort: short, and quick for what top-k leaves."""
    gap = len(ids) // 2
    while gap > 0:
        for start in range(gap, len(ids)):
            token_id, weight, at = ids[start], weights[start], start
            while at >= gap and ids[at - gap] > token_id:
                ids[at], weights[at] = ids[at - gap], weights[at - gap]
                at -= gap
            ids[at], weights[at] = token_id, weight
        gap //= 2


@exact_kernel
def draw_ranked(
    logits: Floats,
    rows: Ids,
    top_k: Ids,
    temperature: Doubles,
    top_p: Doubles,
    min_p: Doubles,
    numbers: Doubles,
    token_ids: Ids,
) -> None:
    """Draw from `rows` of `logits` [R, V] what top-k, then top-p, then min-p leave.

    Args:
        top_k, temperature, top_p, min_p, numbers: of each of `rows`; top-k in [1, V].
        token_ids: one for each of `rows`, filled.
    """
    for index in range(len(rows)):
        values = np.empty(top_k[index], np.float32)
        ids = np.empty(top_k[index], np.int64)
        _select(logits[rows[index]], values, ids)
        peak = values.max()
        weights = np.empty(len(ids), np.float32)
        for place in range(len(ids)):
            weights[place] = np.float32(math.exp((np.float64(values[place]) - peak) / temperature[index]))
        _sort_by_id(ids, weights)
        token_ids[index] = ids[
            _draw_weighted(weights, weights.view(np.int32), top_p[index], min_p[index], numbers[index])
        ]


@exact_kernel
def exclude(logits: Floats, rows: Ids, bits: Patterns) -> None:
    """Set to -inf, in each of `rows` of `logits` [R, V], what its row of `bits` [len(rows), ceil(V / 32)] leaves out.

    The lowest bit of a word is its first token. Words of zeros and of ones, which are most, are not looked into.
    """
    size = logits.shape[1]
    for index in range(len(rows)):
        row = logits[rows[index]]
        for word in range(bits.shape[1]):
            allowed = bits[index, word]
            if allowed == -1:
                continue
            start = word * 32
            stop = min(start + 32, size)
            if allowed == 0:
                for token_id in range(start, stop):
                    row[token_id] = -np.inf
            else:
                for token_id in range(start, stop):
                    if not (allowed >> (token_id - start)) & 1:
                        row[token_id] = -np.inf


def compile_all() -> None:
    """Compile the kernels, or load them from disk, by running each once."""
    logits = np.zeros((1, 2), np.float32)
    one, ids, zero = np.ones(1), np.zeros(1, np.int64), np.zeros(1)
    rank(logits, np.empty((1, 1), np.float32), np.empty((1, 1), np.int64))
    draw(logits + 1, zero, zero, zero, ids)
    exclude(logits, ids, np.full((1, 1), -1, np.int32))
    draw_ranked(logits, ids, ids + 1, one, zero, zero, zero, ids)
