"""RMS norm, alone or after adding to the residual stream."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.shapes import next_power_of_2

# Elements that a warp normalises; wider rows get more warps, up to a block's most.
_ELEMENTS_OF_WARP = 1024
_MAX_WARPS = 16


@triton.jit
def _rms_norm(
    out,
    x,
    residual,
    weight,
    x_stride,
    residual_stride,
    num_columns,
    epsilon,
    weight_offset,
    HAS_RESIDUAL: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One row, held in registers between the sum of its squares and its scaling. Grid (T,)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    is_element = columns < num_columns
    x_row = tl.load(x + row * x_stride + columns, mask=is_element, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        stream = residual + row * residual_stride + columns
        # Rounded as the stream is stored: the norm is of what later layers will read.
        total = (x_row + tl.load(stream, mask=is_element, other=0.0).to(tl.float32)).to(residual.dtype.element_ty)
        tl.store(stream, total, mask=is_element)
        x_row = total.to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(x_row * x_row, 0) / num_columns + epsilon)
    scale = tl.load(weight + columns, mask=is_element, other=0.0).to(tl.float32) + weight_offset
    tl.store(out + row * num_columns + columns, (x_row * inverse_rms * scale).to(out.dtype.element_ty), mask=is_element)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    epsilon: float,
    residual: torch.Tensor | None = None,
    weight_offset: float = 0.0,
) -> torch.Tensor:
    """x / sqrt(mean of squares + epsilon) * (weight + offset) for each row (Zhang and Sennrich, 2019).

    Computed in float32 and rounded once. With a residual, x is added to it in place first, and the sum is normalised.

    Args:
        x, residual: [T, H], a row's elements next to each other.
        weight: [H].
        weight_offset: 1 for models whose weights are deviations from one (gemma).

    Returns:
        [T, H] in the dtype of x, contiguous.
    """
    num_rows, num_columns = x.shape
    out = x.new_empty((num_rows, num_columns))
    if num_rows == 0:
        return out
    columns = next_power_of_2(num_columns)
    _rms_norm[(num_rows,)](
        out,
        x,
        residual,
        weight,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        num_columns,
        epsilon,
        weight_offset,
        HAS_RESIDUAL=residual is not None,
        COLUMNS=columns,
        num_warps=min(_MAX_WARPS, max(1, columns // _ELEMENTS_OF_WARP)),
    )
    return out
