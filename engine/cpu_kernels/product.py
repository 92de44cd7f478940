"""Products with a layer's weights, which lie in panels as the register tile reads them.

A panel is 16 of the weight's rows, side by side: [K, 16]. A product goes over the depth in pieces, so that the piece of
a panel stays in the first-level cache and that of the rows in the second (Goto and van de Geijn, 2008). Weights that
bfloat16 holds exactly are kept in it and widened in registers: a step of few rows is bound by reading them.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from engine.cpu_kernels.arithmetic import FloatArray, PageArray
from engine.cpu_kernels.compiling import kernel, parallel_kernel
from engine.cpu_kernels.register_tile import (
    TILE_COLUMNS,
    TILE_ROWS,
    multiply_add_1,
    multiply_add_2,
    multiply_add_3,
    multiply_add_4,
    multiply_add_5,
    multiply_add_6,
)
from engine.cpu_kernels.shares import next_share

PANEL_COLUMNS = TILE_COLUMNS
# At most 16 KiB of a panel, and 128 KiB of the rows: half of a first-level cache, a quarter of a second.
_DEPTH = 256
BLOCK_ROWS = 128
SHARE_PANELS = 2


def pack(weight: FloatArray, bias: FloatArray | None) -> tuple[PageArray, FloatArray]:
    """Panels and biases of the product x -> x @ weight.T + bias.

    Args:
        weight: [N, K].
        bias: [N].

    Returns:
        panels [ceil(N / 16), K, 16], bfloat16 as uint16 if that is exact, else float32; biases [ceil(N / 16) * 16];
        both zeros beyond N.
    """
    width, depth = weight.shape
    num_panels = -(-width // PANEL_COLUMNS)
    padded = np.zeros((num_panels * PANEL_COLUMNS, depth), np.float32)
    padded[:width] = weight
    panels = np.ascontiguousarray(padded.reshape(num_panels, PANEL_COLUMNS, depth).transpose(0, 2, 1))
    bits = panels.view(np.uint32)
    biases = np.zeros(num_panels * PANEL_COLUMNS, np.float32)
    if bias is not None:
        biases[:width] = bias
    is_exact = not (bits & np.uint32(0xFFFF)).any()
    return (bits >> np.uint32(16)).astype(np.uint16) if is_exact else panels, biases


@kernel
def multiply(
    x: FloatArray,
    first_row: int,
    num_rows: int,
    panels: PageArray,
    bias: FloatArray,
    first_panel: int,
    last_panel: int,
    out: FloatArray,
) -> None:
    """Rows of x times panels. A row's result is the same to the bit whatever rows are beside it.

    Args:
        x: [T, K]; rows first_row:+num_rows, best at most BLOCK_ROWS.
        panels, bias: of these those from `first_panel` to before `last_panel`.
        out: at least [num_rows, 16 panels], contiguous; written from the first row and column on.
    """
    for row in range(num_rows):
        for column in range((last_panel - first_panel) * PANEL_COLUMNS):
            out[row, column] = bias[first_panel * PANEL_COLUMNS + column]
    depth = x.shape[1]
    # Strips of equal height, give or take a row: a last strip of one row would be as slow as one of six.
    num_strips = (num_rows + TILE_ROWS - 1) // TILE_ROWS
    for start in range(0, depth, _DEPTH):
        length = min(_DEPTH, depth - start)
        for index in range(first_panel, last_panel):
            panel, column = panels[index], (index - first_panel) * PANEL_COLUMNS
            row = 0
            for strip in range(num_strips):
                stop = num_rows * (strip + 1) // num_strips
                height, a = stop - row, first_row + row
                if height == 6:
                    multiply_add_6(x, a, start, panel, start, 0, out, row, column, length)
                elif height == 5:
                    multiply_add_5(x, a, start, panel, start, 0, out, row, column, length)
                elif height == 4:
                    multiply_add_4(x, a, start, panel, start, 0, out, row, column, length)
                elif height == 3:
                    multiply_add_3(x, a, start, panel, start, 0, out, row, column, length)
                elif height == 2:
                    multiply_add_2(x, a, start, panel, start, 0, out, row, column, length)
                else:
                    multiply_add_1(x, a, start, panel, start, 0, out, row, column, length)
                row = stop


@kernel
def num_shares(num_rows: int, num_panels: int) -> int:
    """Into how many shares threads cut a product of so many rows and panels."""
    shares: int = ((num_rows + BLOCK_ROWS - 1) // BLOCK_ROWS) * ((num_panels + SHARE_PANELS - 1) // SHARE_PANELS)
    return shares


@kernel
def share_at(share: int, num_rows: int, num_panels: int) -> tuple[int, int, int, int]:
    """First row, number of rows, first panel and last of a share; shares of the same rows follow each other."""
    across = (num_panels + SHARE_PANELS - 1) // SHARE_PANELS
    first_row, first_panel = share // across * BLOCK_ROWS, share % across * SHARE_PANELS
    num = min(BLOCK_ROWS, num_rows - first_row)
    return first_row, num, first_panel, min(num_panels, first_panel + SHARE_PANELS)


@kernel
def _multiply_shares(
    counters: npt.NDArray[np.int64], x: FloatArray, panels: PageArray, bias: FloatArray, out: FloatArray
) -> None:
    num_rows, num_panels = out.shape[0], panels.shape[0]
    tile = np.empty((min(BLOCK_ROWS, num_rows), SHARE_PANELS * PANEL_COLUMNS), np.float32)
    total = num_shares(num_rows, num_panels)
    share = next_share(counters, 0)
    while share < total:
        first, count, first_panel, last_panel = share_at(share, num_rows, num_panels)
        multiply(x, first, count, panels, bias, first_panel, last_panel, tile)
        start = first_panel * PANEL_COLUMNS
        for row in range(count):
            for column in range(min(last_panel * PANEL_COLUMNS, out.shape[1]) - start):
                out[first + row, start + column] = tile[row, column]
        share = next_share(counters, 0)


@parallel_kernel
def multiply_all(x: FloatArray, panels: PageArray, bias: FloatArray, out: FloatArray, num_threads: int) -> None:
    """out = x @ W.T + b; x [T, K], out [T, N]; on that many threads."""
    counters = np.zeros(1, np.int64)
    for _ in numba.prange(num_threads):
        _multiply_shares(counters, x, panels, bias, out)
