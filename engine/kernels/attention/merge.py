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
    HAS_SINKS: tl.constexpr,
):
    """One row of the output from its partial results, in the order of segments. Grid (T, Hq).

    Empty segments change no bit. Arguments as in `engine.kernels.attention.paged.paged_attention`.
    """
    head = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + head
    dims = tl.arange(0, DIMS)
    acc = tl.zeros((DIMS,), dtype=tl.float32)
    # Below any logit, yet finite: an empty first segment must not make -inf - -inf.
    total_max = -3.0e38
    total_sum = 0.0
    for segment in range(num_segments):
        partial_row = row * num_segments + segment
        segment_max = tl.load(partial_max + partial_row)
        segment_sum = tl.load(partial_sum + partial_row)
        segment_out = tl.load(partial_out + partial_row * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0)
        new_max = tl.maximum(total_max, segment_max)
        old_share = tl.exp2(total_max - new_max)
        new_share = tl.exp2(segment_max - new_max)
        acc = acc * old_share + segment_out * new_share
        total_sum = total_sum * old_share + segment_sum * new_share
        total_max = new_max
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        total_sum += tl.exp2(sink * LOG2_E - total_max)
    result = acc / total_sum
    tl.store(out + row * HEAD_DIM + dims, result.to(out.dtype.element_ty), mask=dims < HEAD_DIM)
