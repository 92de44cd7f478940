"""The gate of a gated MLP."""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl

Activation = Literal["silu", "gelu_tanh"]

_COLUMNS = 1024


@triton.jit
def _gate(out, gate, up, gate_stride, up_stride, num_columns, SILU: tl.constexpr, COLUMNS: tl.constexpr):
    """COLUMNS elements of one row. Grid (T, chunks of a row)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_element = columns < num_columns
    x = tl.load(gate + row * gate_stride + columns, mask=is_element, other=0.0).to(tl.float32)
    factor = tl.load(up + row * up_stride + columns, mask=is_element, other=0.0).to(tl.float32)
    # (1 + tanh(y)) / 2 is sigmoid(2 y).
    steepness = 1.0 if SILU else 1.5957691216057308 * (1.0 + 0.044715 * x * x)
    product = x * tl.sigmoid(x * steepness) * factor
    tl.store(out + row * num_columns + columns, product.to(out.dtype.element_ty), mask=is_element)


def apply_gate(gate: torch.Tensor, up: torch.Tensor, activation: Activation = "silu") -> torch.Tensor:
    """activation(gate) * up (Shazeer, "GLU Variants", 2020), in float32, rounded once.

    Args:
        gate, up: [T, I], a row's elements next to each other: halves of a fused projection, say.
        activation: "silu" is x / (1 + exp(-x)); "gelu_tanh" is x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2.

    Returns:
        [T, I] in the dtype of `gate`, contiguous.
    """
    num_rows, num_columns = gate.shape
    out = gate.new_empty((num_rows, num_columns))
    if num_rows:
        _gate[num_rows, triton.cdiv(num_columns, _COLUMNS)](
            out,
            gate,
            up,
            gate.stride(0),
            up.stride(0),
            num_columns,
            SILU=activation == "silu",
            COLUMNS=_COLUMNS,
        )
    return out
