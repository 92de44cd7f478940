"""Measures tiles for attention and prints the best as rows of `engine.kernels.tiles`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from triton.runtime.errors import OutOfResources

from bench.gpu.shapes import NUM_HEADS, layout
from bench.gpu.timing import seconds
from bench.kernels import Call, Shape
from engine.kernels.attention import Batch, attend
from engine.kernels.tiles import AttentionTile

HEAD_DIMS = (64, 128, 256)
DECODES = (Shape(1, 1, 65536), Shape(16, 1, 8192), Shape(128, 1, 4096))
PREFILLS = (Shape(1, 4096, 4096), Shape(4, 1024, 8192))


def decode_tiles() -> Iterator[AttentionTile]:
    for keys, num_warps, num_stages in itertools.product((32, 64, 128), (2, 4, 8), (2, 3, 5, 7)):
        for descriptors in (False, True):
            yield AttentionTile(16, keys, num_warps, num_stages, descriptors)


def prefill_tiles() -> Iterator[AttentionTile]:
    for rows, keys, num_warps, num_stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 5)):
        for descriptors in (False, True):
            yield AttentionTile(rows, keys, num_warps, num_stages, descriptors)


def measure(tile: AttentionTile, calls: Sequence[Call], device: torch.device) -> float:
    """Geometric mean of the seconds of calls with a tile; infinite if the GPU cannot hold it."""
    try:
        times = [seconds(lambda call=call: attend_with(tile, call), device) for call in calls]  # type: ignore[misc]
    except OutOfResources:
        return math.inf
    return math.exp(sum(map(math.log, times)) / len(times))


def attend_with(tile: AttentionTile, call: Call) -> torch.Tensor:
    context = call.context
    batch = Batch(
        block_tables=call.group.block_tables,
        cu_seqlens_q=context.cu_seqlens_q,
        seq_lens=context.seq_lens,
        max_query_len=context.max_query_len,
        max_seq_len=context.max_seq_len,
    )
    return attend(call.query, call.pages, batch, scale=call.layout.head_dim**-0.5, tile=tile)


def tune(device: torch.device, block_size: int) -> Iterator[str]:
    """Rows for this GPU, the best first, for decodes and then for chunks of each head size."""
    for limit, shapes, tiles in (("_DECODE", DECODES, decode_tiles), ("_ANY", PREFILLS, prefill_tiles)):
        for head_dim in HEAD_DIMS:
            calls = [Call.make(layout(block_size, head_dim), shape, NUM_HEADS, device) for shape in shapes]
            timed = sorted((measure(tile, calls, device), index, tile) for index, tile in enumerate(tiles()))
            for mean, _, tile in timed[:3]:
                yield f"{row(limit, head_dim, tile)}  # {mean * 1e6:.1f} us"


def row(limit: str, head_dim: int, tile: AttentionTile) -> str:
    """As the table has it."""
    sizes = f"{tile.rows}, {tile.keys}, {tile.num_warps}, {tile.num_stages}"
    descriptors = ", descriptors=True" if tile.descriptors else ""
    return f"Row({limit}, {head_dim}, 2, AttentionTile({sizes}{descriptors})),"
