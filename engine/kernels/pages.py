"""Moves keys and values: a step's tokens into their slots, and whole blocks between a pool and a buffer."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.shapes import next_power_of_2

# Words of 4 bytes that one program of a copy moves: each of its 128 threads has two accesses of 16 bytes under way.
_CHUNK_WORDS = 1024


@triton.jit
def _write(
    key,
    value,
    pages,
    slots,
    num_heads,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    DIMS: tl.constexpr,
):
    """One token's keys and values. Grid (T,)."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    heads = tl.arange(0, HEADS)[:, None]
    dims = tl.arange(0, DIMS)[None, :]
    is_element = (heads < num_heads) & (dims < HEAD_DIM)
    keys = tl.load(key + token * key_token_stride + heads * key_head_stride + dims, mask=is_element)
    values = tl.load(value + token * value_token_stride + heads * value_head_stride + dims, mask=is_element)
    page = pages + slot // BLOCK_SIZE * (2 * num_heads * BLOCK_SIZE * HEAD_DIM)
    key_side = page + (heads * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM + dims
    value_side = key_side + num_heads * BLOCK_SIZE * HEAD_DIM
    tl.store(key_side, keys.to(pages.dtype.element_ty), mask=is_element)
    tl.store(value_side, values.to(pages.dtype.element_ty), mask=is_element)


def write(key: torch.Tensor, value: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor) -> None:
    """Store the step's tokens, converted to the pages' dtype.

    Args:
        key, value: [T, Hkv, D], a head's elements next to each other.
        pages: [num_blocks, 2, Hkv, B, D], contiguous.
        slots: int64 [T]; block * B + offset of each token, below 0 for none.
    """
    assert pages.is_contiguous()
    assert key.stride(2) == value.stride(2) == 1
    num_tokens, num_heads, head_dim = key.shape
    if num_tokens == 0:
        return
    _write[(num_tokens,)](
        key,
        value,
        pages,
        slots,
        num_heads,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        BLOCK_SIZE=pages.shape[3],
        HEAD_DIM=head_dim,
        HEADS=next_power_of_2(num_heads),
        DIMS=next_power_of_2(head_dim),
    )


@triton.jit
def _copy_blocks(
    pool,
    buffer,
    block_ids,
    pool_slot_stride,
    num_words,
    GATHER: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """CHUNK words of one page. Grid (blocks, slots, chunks of a page)."""
    block = tl.load(block_ids + tl.program_id(0)).to(tl.int64)
    if block < 0:
        return
    slot = tl.program_id(1).to(tl.int64)
    words = tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)
    in_pool = pool + slot * pool_slot_stride + block * num_words + words
    in_buffer = buffer + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + slot) * num_words + words
    if GATHER:
        tl.store(in_buffer, tl.load(in_pool, mask=words < num_words), mask=words < num_words)
    else:
        tl.store(in_pool, tl.load(in_buffer, mask=words < num_words), mask=words < num_words)


def gather_blocks(pool: torch.Tensor, block_ids: torch.Tensor, buffer: torch.Tensor) -> None:
    """Copy whole blocks to a transfer buffer, whatever they hold.

    Args:
        pool: [num_slots, num_blocks, 2, Hkv, B, D], each slot contiguous.
        block_ids: integers [n]; a place of the buffer whose block is below 0 is left as it is.
        buffer: [n, num_slots, 2, Hkv, B, D], contiguous, of the pool's dtype.
    """
    _launch_copy(pool, block_ids, buffer, gather=True)


def scatter_blocks(buffer: torch.Tensor, block_ids: torch.Tensor, pool: torch.Tensor) -> None:
    """The reverse of `gather_blocks`: `block_ids` that are not below 0 must differ."""
    _launch_copy(pool, block_ids, buffer, gather=False)


def _launch_copy(pool: torch.Tensor, block_ids: torch.Tensor, buffer: torch.Tensor, *, gather: bool) -> None:
    num_slots, num_blocks = pool.shape[:2]
    assert buffer.is_contiguous()
    assert pool[0].is_contiguous()
    assert buffer.shape == (len(block_ids), num_slots, *pool.shape[2:])
    assert buffer.dtype == pool.dtype
    if len(block_ids) == 0:
        return
    as_words = pool.view(num_slots, num_blocks, -1).view(torch.int32)
    num_words = as_words.shape[2]
    _copy_blocks[len(block_ids), num_slots, triton.cdiv(num_words, _CHUNK_WORDS)](
        as_words,
        buffer.view(-1).view(torch.int32),
        block_ids,
        as_words.stride(0),
        num_words,
        GATHER=gather,
        CHUNK=_CHUNK_WORDS,
    )
