"""The gate of a gated MLP."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_COLUMNS = 1024


@triton.jit
def _silu_multiply(out, gate, up, gate_stride, up_stride, num_columns, COLUMNS: tl.constexpr):
    """COLUMNS elements of one row. Grid (T, chunks of a row)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_element = columns < num_columns
    x = tl.load(gate + row * gate_stride + columns, mask=is_element, other=0.0).to(tl.float32)
    factor = tl.load(up + row * up_stride + columns, mask=is_element, other=0.0).to(tl.float32)
    product = x * tl.sigmoid(x) * factor
    tl.store(out + row * num_columns + columns, product.to(out.dtype.element_ty), mask=is_element)


def silu_multiply(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, with silu(x) = x / (1 + exp(-x)) (Shazeer, "GLU Variants", 2020), in float32, rounded once.

    Args:
        gate, up: [T, I], a row's elements next to each other: halves of a fused projection, say.

    Returns:
        [T, I] in the dtype of `gate`, contiguous.
    """
    num_rows, num_columns = gate.shape
    out = gate.new_empty((num_rows, num_columns))
    if num_rows:
        _silu_multiply[num_rows, triton.cdiv(num_columns, _COLUMNS)](
            out, gate, up, gate.stride(0), up.stride(0), num_columns, COLUMNS=_COLUMNS
        )
    return out
