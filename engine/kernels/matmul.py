"""Matrix products whose rows do not depend on each other, to the bit: for batch-invariant mode.

Libraries choose tiles and split the sum over the inner dimension by the number of rows, which changes the order of
additions. Here both are the same for any number of rows (He et al., "Defeating Nondeterminism in LLM Inference",
Thinking Machines Lab, 2025).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from engine.kernels.gpu import Gpu, gpu_of
from engine.kernels.tiles import product_tile

# Blocks of rows that take their turns on one block of columns before the next, so that weights are read from the L2.
_ROW_BLOCKS = 8


# The number of rows must not make Triton compile a kernel for it.
@triton.jit(do_not_specialize=["num_rows"])
def _matmul(
    out,
    x,
    weight,
    bias,
    num_rows,
    num_columns,
    depth,
    out_stride,
    x_stride,
    weight_stride,
    HAS_BIAS: tl.constexpr,
    ADD: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
):
    """One tile of x @ weight.T, added to `out` if ADD. Grid (blocks of rows * blocks of columns,).

    Args:
        x, weight: pointers, or descriptors of tiles [ROWS, DEPTH] and [COLUMNS, DEPTH].
    """
    row_blocks = tl.cdiv(num_rows, ROWS)
    programs_of_strip = ROW_BLOCKS * tl.cdiv(num_columns, COLUMNS)
    strip = tl.program_id(0) // programs_of_strip
    height = tl.minimum(row_blocks - strip * ROW_BLOCKS, ROW_BLOCKS)
    in_strip = tl.program_id(0) % programs_of_strip
    first_row = (strip * ROW_BLOCKS + in_strip % height) * ROWS
    first_column = in_strip // height * COLUMNS

    rows = first_row + tl.arange(0, ROWS)
    columns = first_column + tl.arange(0, COLUMNS)
    steps = tl.arange(0, DEPTH)
    acc = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, depth, DEPTH):
        if DESCRIPTORS:
            left = x.load([first_row, start])
            right = weight.load([first_column, start])
        else:
            is_step = (start + steps < depth)[None, :]
            left_at = x + rows.to(tl.int64)[:, None] * x_stride + (start + steps)[None, :]
            left = tl.load(left_at, mask=is_step & (rows < num_rows)[:, None], other=0.0)
            right_at = weight + columns.to(tl.int64)[:, None] * weight_stride + (start + steps)[None, :]
            right = tl.load(right_at, mask=is_step & (columns < num_columns)[:, None], other=0.0)
        acc = tl.dot(left, tl.trans(right), acc, input_precision="ieee")

    if HAS_BIAS:
        acc += tl.load(bias + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[None, :]
    out_at = out + rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
    is_element = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    if ADD:
        acc += tl.load(out_at, mask=is_element, other=0.0).to(tl.float32)
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=is_element)


def matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    gpu: Gpu | None = None,
) -> torch.Tensor:
    """x @ weight.T + bias + residual, accumulated in float32 and rounded once.

    A row of the result is the same to the bit whatever other rows there are, and however many.

    Args:
        x: [T, K]; weight: [N, K], of the same dtype; a row's elements next to each other.
        bias: [N].
        residual: [T, N], which is overwritten with the result.
        gpu: whose tile to take; that of `x` if not given.

    Returns:
        [T, N] in the dtype of x: `residual` if there is one.
    """
    assert x.stride(1) == weight.stride(1) == 1
    assert x.dtype == weight.dtype
    num_rows, depth = x.shape
    num_columns = len(weight)
    out = x.new_empty((num_rows, num_columns)) if residual is None else residual
    assert out.stride(1) == 1
    if num_rows == 0:
        return out
    gpu = gpu or gpu_of(x.device)
    tile = product_tile(gpu.architecture, itemsize=x.dtype.itemsize)
    descriptors = tile.descriptors and gpu.has_descriptors and _can_copy_tiles(x) and _can_copy_tiles(weight)
    grid = (triton.cdiv(num_rows, tile.rows) * triton.cdiv(num_columns, tile.columns),)
    _matmul[grid](
        out,
        _tiles(x, tile.rows, tile.depth) if descriptors else x,
        _tiles(weight, tile.columns, tile.depth) if descriptors else weight,
        bias,
        num_rows,
        num_columns,
        depth,
        out.stride(0),
        x.stride(0),
        weight.stride(0),
        HAS_BIAS=bias is not None,
        ADD=residual is not None,
        DESCRIPTORS=descriptors,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        ROW_BLOCKS=_ROW_BLOCKS,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


def _can_copy_tiles(matrix: torch.Tensor) -> bool:
    """Whether rows begin at multiples of 16 bytes, as descriptors want them."""
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.dtype.itemsize % 16 == 0


def _tiles(matrix: torch.Tensor, rows: int, depth: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, depth])
