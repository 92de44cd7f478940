"""Draws tokens from batches of logits, each row by its own parameters; `engine.sampling` says by which rules.

Top-k and top-p both keep a prefix of the ranking by logit, of equal logits the lowest ids first: so what they leave is
told by a threshold and by how many logits that equal it are kept. Then one random number inverts the cumulative
distribution in the order of token ids.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.philox import uniform
from engine.kernels.sampling.threshold import float_of, key_of, largest_key_reaching, load_scaled, measure_above

_TILE = 2048
_SEARCH_TILE = 512
_NUM_WARPS = 8


@triton.jit
def _largest(row, num_ids, TILE: tl.constexpr):
    """The largest logit and the lowest id that has it."""
    lanes = tl.arange(0, TILE)
    best = tl.load(row + lanes, mask=lanes < num_ids, other=float("-inf"))
    best_ids = lanes
    for start in range(TILE, num_ids, TILE):
        ids = start + lanes
        logits = tl.load(row + ids, mask=ids < num_ids, other=float("-inf"))
        best_ids = tl.where(logits > best, ids, best_ids)
        best = tl.maximum(logits, best)
    largest = tl.max(best, 0)
    return largest, tl.min(tl.where(best == largest, best_ids, num_ids - 1), 0)


@triton.jit
def _threshold(row, num_ids, temperature, peak, top_k, top_p, TILE: tl.constexpr, SEARCH_TILE: tl.constexpr):
    """What top-k, then top-p leave: keys above a threshold, and so many of those that equal it."""
    threshold = tl.full((), 0, tl.uint32)
    num_equal = num_ids + 0
    total = tl.full((), 0.0, tl.float64)
    if (top_k > 0) & (top_k < num_ids):
        goal = top_k.to(tl.float64)
        threshold = largest_key_reaching(goal, row, num_ids, temperature, peak, False, SEARCH_TILE)
        count, total = measure_above(threshold, row, num_ids, temperature, peak, TILE)
        num_equal = top_k - count
        total += num_equal * tl.exp(float_of(threshold) - peak).to(tl.float64)
    else:
        _, total = measure_above(threshold, row, num_ids, temperature, peak, TILE)
    if top_p < 1.0:
        mass = top_p * total
        lowest = largest_key_reaching(mass, row, num_ids, temperature, peak, True, SEARCH_TILE)
        _, above = measure_above(lowest, row, num_ids, temperature, peak, TILE)
        weight = tl.exp(float_of(lowest) - peak).to(tl.float64)
        # As many as the mass still lacks; at least the most likely token.
        num_lacking = tl.maximum(tl.ceil((mass - above) / weight), 1.0).to(tl.int32)
        num_equal = tl.where(lowest > threshold, num_lacking, tl.minimum(num_equal, num_lacking))
        threshold = lowest
    return threshold, num_equal


@triton.jit
def _kept_weights(row, ids, num_ids, temperature, peak, threshold, num_equal, min_p):
    """Weights of some ids, 0 for those that a filter excludes, and how many of them equal the threshold."""
    x = load_scaled(row, ids, num_ids, temperature)
    keys = key_of(x)
    is_equal = keys == threshold
    rank = tl.cumsum(is_equal.to(tl.int32), 0)
    weights = tl.exp(x - peak)
    is_kept = ((keys > threshold) | (is_equal & (rank <= num_equal))) & (weights >= min_p)
    return tl.where(is_kept, weights, 0.0).to(tl.float64), tl.max(rank, 0)


@triton.jit
def _choose(
    token_ids,
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    streams,
    positions,
    logits_stride,
    num_ids,
    TILE: tl.constexpr,
    SEARCH_TILE: tl.constexpr,
):
    """One row. Grid (R,)."""
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * logits_stride
    temperature = tl.load(temperatures + index)
    largest, largest_id = _largest(row, num_ids, TILE)
    if temperature <= 0.0:
        tl.store(token_ids + index, largest_id)
        return
    peak = tl.div_rn(largest, temperature)
    top_k, top_p, min_p = tl.load(top_ks + index), tl.load(top_ps + index), tl.load(min_ps + index)
    threshold, num_equal = _threshold(row, num_ids, temperature, peak, top_k, top_p, TILE, SEARCH_TILE)

    total = tl.full((), 0.0, tl.float64)
    num_left = num_equal
    for start in range(0, num_ids, TILE):
        ids = start + tl.arange(0, TILE)
        weights, num_seen = _kept_weights(row, ids, num_ids, temperature, peak, threshold, num_left, min_p)
        total += tl.sum(weights, 0)
        num_left -= num_seen

    target = uniform(tl.load(seeds + index), tl.load(streams + index), tl.load(positions + index)) * total
    # Broken logits exceed nothing: the most likely token then, which is one of the vocabulary in any case.
    chosen = largest_id
    before = tl.full((), 0.0, tl.float64)
    num_left = num_equal
    for start in range(0, num_ids, TILE):
        ids = start + tl.arange(0, TILE)
        weights, num_seen = _kept_weights(row, ids, num_ids, temperature, peak, threshold, num_left, min_p)
        after = before + tl.sum(weights, 0)
        if (before <= target) & (target < after):
            exceeds = (before + tl.cumsum(weights, 0) > target) & (weights > 0)
            chosen = tl.min(tl.where(exceeds, ids, num_ids - 1), 0)
        before = after
        num_left -= num_seen
    tl.store(token_ids + index, chosen)


def choose(
    logits: torch.Tensor,
    *,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    streams: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """The next token of each row: a function of its logits, parameters, seed, stream and position alone.

    Args:
        logits: float32 [R, V], a row's elements next to each other; edited already, left as they are.
        temperature: float32 [R]; 0 takes the most likely token, the lowest id among equals.
        top_k: int32 [R]; 0 for no limit.
        top_p: float64 [R]; 1 for no limit. min_p: float32 [R]; 0 for no limit.
        seeds: int64 [R], 64 bits; streams, positions: int64 [R], below 2**32.

    Returns:
        int32 [R].
    """
    assert logits.dtype == torch.float32
    assert logits.stride(1) == 1
    num_rows, num_ids = logits.shape
    token_ids = logits.new_empty(num_rows, dtype=torch.int32)
    if num_rows:
        _choose[(num_rows,)](
            token_ids,
            logits,
            temperature,
            top_k,
            top_p,
            min_p,
            seeds,
            streams,
            positions,
            logits.stride(0),
            num_ids,
            TILE=_TILE,
            SEARCH_TILE=_SEARCH_TILE,
            num_warps=_NUM_WARPS,
        )
    return token_ids
