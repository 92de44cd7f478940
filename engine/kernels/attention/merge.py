"""Merges what attention over the segments of a context left: softmax is associative in (output, maximum, sum)."""

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.attention.softmax import LOG2_E


@triton.jit(do_not_specialize=["num_segments"])
def merge_segments(
    out,
    partial_out,
    partial_max,
    partial_sum,
    sinks,
    num_segments,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """One row of the output from its partial results, SEGMENTS at a time. Grid (T, Hq).

    Arguments as in `engine.kernels.attention.paged.paged_attention`.
    """
    head = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + head
    dims = tl.arange(0, DIMS)
    acc = tl.zeros((DIMS,), dtype=tl.float32)
    # Below any logit, yet finite: an empty first segment must not make -inf - -inf.
    total_max = -3.0e38
    total_sum = 0.0
    for first in range(0, num_segments, SEGMENTS):
        segments = first + tl.arange(0, SEGMENTS)
        is_segment = segments < num_segments
        partial_rows = row * num_segments + segments
        maxima = tl.load(partial_max + partial_rows, mask=is_segment, other=float("-inf"))
        sums = tl.load(partial_sum + partial_rows, mask=is_segment, other=0.0)
        elements = partial_rows[:, None] * HEAD_DIM + dims[None, :]
        outs = tl.load(partial_out + elements, mask=is_segment[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
        new_max = tl.maximum(total_max, tl.max(maxima, 0))
        old_share = tl.exp2(total_max - new_max)
        shares = tl.exp2(maxima - new_max)
        acc = acc * old_share + tl.sum(outs * shares[:, None], 0)
        total_sum = total_sum * old_share + tl.sum(sums * shares, 0)
        total_max = new_max
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        total_sum += tl.exp2(sink * LOG2_E - total_max)
    result = acc / tl.where(total_sum > 0.0, total_sum, 1.0)
    tl.store(out + row * HEAD_DIM + dims, result.to(out.dtype.element_ty), mask=dims < HEAD_DIM)
