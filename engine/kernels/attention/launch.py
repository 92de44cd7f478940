"""Launches attention on torch tensors."""

from __future__ import annotations

import dataclasses

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from engine.kernels.attention.merge import merge_segments
from engine.kernels.attention.paged import paged_attention
from engine.kernels.attention.plan import Plan, plan
from engine.kernels.attention.softmax import LOG2_E
from engine.kernels.gpu import Gpu, gpu_of
from engine.kernels.shapes import next_power_of_2
from engine.kernels.tiles import AttentionTile

# Segments whose partial results are read together.
_MERGED_SEGMENTS = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """A step's sequences; sequence s has the queries cu_seqlens_q[s] : cu_seqlens_q[s + 1], its last positions.

    Attributes:
        block_tables: int32 [S, max_blocks]; cu_seqlens_q: int32 [S + 1]; seq_lens: int32 [S].
        max_query_len: most queries of a sequence.
        max_seq_len: about the longest context; see `engine.kernels.attention.plan.plan`.
    """

    block_tables: torch.Tensor
    cu_seqlens_q: torch.Tensor
    seq_lens: torch.Tensor
    max_query_len: int
    max_seq_len: int


def attend(
    query: torch.Tensor,
    pages: torch.Tensor,
    batch: Batch,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    batch_invariant: bool = False,
    gpu: Gpu | None = None,
    tile: AttentionTile | None = None,
) -> torch.Tensor:
    """Causal attention as `engine.attention.base.AttentionBackend.attend` has it.

    Args:
        query: [T, Hq, D] of the pages' dtype, a head's elements next to each other.
        pages: [num_blocks, 2, Hkv, B, D], contiguous; float32, float16 or bfloat16.
        sinks: [Hq].
        scale: above 0.
        batch_invariant: whether a token's output must not depend on the batch, to the bit.
        gpu: what to plan for; that of the query if not given.
        tile: instead of the table's, to measure it.

    Returns:
        [T, Hq, D], contiguous.

    Raises:
        ValueError: heads are wider than the kernels are made for.
    """
    num_tokens, num_heads, head_dim = query.shape
    if num_tokens == 0:
        return query.new_empty(query.shape)
    num_kv_heads = pages.shape[2]
    gpu = gpu or gpu_of(query.device)
    cut = plan(
        gpu,
        num_tokens=num_tokens,
        num_sequences=len(batch.seq_lens),
        num_kv_heads=num_kv_heads,
        group=num_heads // num_kv_heads,
        head_dim=_padded(head_dim),
        itemsize=pages.dtype.itemsize,
        max_query_len=batch.max_query_len,
        max_seq_len=batch.max_seq_len,
        window=window,
        batch_invariant=batch_invariant,
        tile=tile,
    )
    return launch(query, pages, batch, cut, gpu, scale=scale, window=window, softcap=softcap, sinks=sinks)


def launch(
    query: torch.Tensor,
    pages: torch.Tensor,
    batch: Batch,
    cut: Plan,
    gpu: Gpu,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """`attend` of at least one token, cut as it is told."""
    assert query.dtype == pages.dtype
    assert pages.is_contiguous()
    assert query.stride(2) == 1
    assert scale > 0
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads, block_size = pages.shape[2], pages.shape[3]
    out = query.new_empty((num_tokens, num_heads, head_dim))
    dims = _padded(head_dim)
    descriptor = cut.tile.descriptors and gpu.has_descriptors and _can_copy_tiles(pages, cut.tile.keys)
    split = cut.segments > 1
    partial_out = partial_max = partial_sum = None
    if split:
        shape = (num_tokens, num_heads, cut.segments)
        partial_out = query.new_empty((*shape, head_dim), dtype=torch.float32)
        partial_max, partial_sum = (query.new_empty(shape, dtype=torch.float32) for _ in range(2))
    paged_attention[cut.query_blocks, num_kv_heads, cut.segments](
        out,
        partial_out,
        partial_max,
        partial_sum,
        query,
        _tiles(pages, cut.tile.keys, dims) if descriptor else pages,
        batch.block_tables,
        batch.cu_seqlens_q,
        batch.seq_lens,
        sinks,
        len(batch.seq_lens),
        batch.block_tables.stride(0),
        query.stride(0),
        query.stride(1),
        window or 0,
        scale / softcap if softcap else 0.0,
        (softcap or scale) * LOG2_E.value,
        GROUP=num_heads // num_kv_heads,
        ROWS=cut.tile.rows,
        TILE=cut.tile.keys,
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        DIMS=dims,
        HAS_WINDOW=window is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_SINKS=sinks is not None,
        DECODE=cut.decode,
        SPLIT=split,
        DESCRIPTOR=descriptor,
        num_warps=cut.tile.num_warps,
        num_stages=cut.tile.num_stages,
    )
    if split:
        merge_segments[num_tokens, num_heads](
            out,
            partial_out,
            partial_max,
            partial_sum,
            sinks,
            cut.segments,
            HEAD_DIM=head_dim,
            DIMS=dims,
            SEGMENTS=_MERGED_SEGMENTS,
            HAS_SINKS=sinks is not None,
            num_warps=max(1, dims // 64),
        )
    return out


def _padded(head_dim: int) -> int:
    """Dimensions of a tile: what matrix instructions take at the least, or the next power of two."""
    return max(16, next_power_of_2(head_dim))


def _can_copy_tiles(pages: torch.Tensor, keys: int) -> bool:
    """Whether tiles lie inside blocks, and rows begin at multiples of 16 bytes, as descriptors want them."""
    block_size, head_dim = pages.shape[3:]
    return block_size % keys == 0 and head_dim * pages.dtype.itemsize % 16 == 0


def _tiles(pages: torch.Tensor, keys: int, dims: int) -> TensorDescriptor:
    """The pool's slot as a matrix [num_blocks * 2 * Hkv * B, D], to be copied in tiles [keys, dims]."""
    matrix = pages.view(-1, pages.shape[-1])
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [keys, dims])
