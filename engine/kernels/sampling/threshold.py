"""Finds how far down the ranking of a row's logits a filter reaches, without sorting them.

Floats are mapped to unsigned keys of the same order, and the wanted key is found digit by digit, as in radix selection
(Alabi et al., "Fast k-selection algorithms for graphics processing units", 2012): one pass over the row for each digit
measures what lies at or above every value that the digit can take. Measured is a number of logits for top-k, the sum of
their weights for top-p.
"""

from __future__ import annotations

import triton
import triton.language as tl

# A pass tells 2**4 values of a digit apart; more would not fit the registers.
DIGIT_BITS = tl.constexpr(4)
DIGIT_VALUES = tl.constexpr(16)
NUM_DIGITS = tl.constexpr(8)


@triton.jit
def key_of(x):
    """uint32 keys in the order of floats; 0 and -0 have the same."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)


@triton.jit
def float_of(key):
    """The inverse of `key_of`."""
    bits = tl.where(key >= 0x80000000, key ^ 0x80000000, key ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def load_scaled(row, ids, num_ids, temperature):
    """Logits over temperature, rounded as torch's division; -inf beyond the vocabulary."""
    logits = tl.load(row + ids, mask=ids < num_ids, other=float("-inf"))
    return tl.div_rn(logits, temperature)


@triton.jit
def largest_key_reaching(goal, row, num_ids, temperature, peak, MASS: tl.constexpr, TILE: tl.constexpr):
    """The largest key such that logits with keys at or above it measure `goal` or more; it is the key of a logit.

    Args:
        goal: float64; at most what all logits measure.
        row: pointer to float32 [num_ids]; peak: the largest of them over temperature.
        MASS: whether the sum of weights exp(logit / temperature - peak) is measured, or the number of logits.
    """
    key = tl.full((), 0, tl.uint32)
    digits = tl.arange(0, DIGIT_VALUES).to(tl.uint32)
    for place in range(NUM_DIGITS):
        shift = (NUM_DIGITS - 1 - place) * DIGIT_BITS
        candidates = key + (digits << shift)
        measures = tl.zeros((TILE, DIGIT_VALUES), tl.float64)
        for start in range(0, num_ids, TILE):
            ids = start + tl.arange(0, TILE)
            x = load_scaled(row, ids, num_ids, temperature)
            weights = tl.exp(x - peak) if MASS else (ids < num_ids).to(tl.float32)
            reaches = key_of(x)[:, None] >= candidates[None, :]
            measures += tl.where(reaches, weights[:, None], 0.0).to(tl.float64)
        # What is measured falls as the candidates rise; the lowest of them reaches the goal by induction.
        num_reaching = tl.sum((tl.sum(measures, 0) >= goal).to(tl.int32), 0)
        key += (tl.maximum(num_reaching, 1) - 1).to(tl.uint32) << shift
    return key


@triton.jit
def measure_above(key, row, num_ids, temperature, peak, TILE: tl.constexpr):
    """How many logits have keys above `key`, and the sum of their weights: int32 and float64."""
    counts = tl.zeros((TILE,), tl.int32)
    masses = tl.zeros((TILE,), tl.float64)
    for start in range(0, num_ids, TILE):
        x = load_scaled(row, start + tl.arange(0, TILE), num_ids, temperature)
        is_above = key_of(x) > key
        counts += is_above.to(tl.int32)
        masses += tl.where(is_above, tl.exp(x - peak), 0.0).to(tl.float64)
    return tl.sum(counts, 0), tl.sum(masses, 0)
