"""Moves keys and values: a step's tokens into their slots, and pages between pools and buffers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from engine.kernels.shapes import next_power_of_2

# Words of 4 bytes that one program of a copy moves: each of its 256 threads has four accesses of 16 bytes under way.
_CHUNK_WORDS = 4096


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
def _copy_pages(
    source,
    target,
    source_pages,
    target_pages,
    source_page_words,
    target_page_words,
    source_run_stride,
    target_run_stride,
    run_words,
    CHUNK: tl.constexpr,
):
    """CHUNK words of one run of one page. Grid (pages, chunks of a run, runs)."""
    index = tl.program_id(0).to(tl.int64)
    source_page = index if source_pages is None else tl.load(source_pages + index)
    target_page = index if target_pages is None else tl.load(target_pages + index)
    run = tl.program_id(2)
    words = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    is_word = words < run_words
    moved = tl.load(source + source_page * source_page_words + run * source_run_stride + words, mask=is_word)
    tl.store(target + target_page * target_page_words + run * target_run_stride + words, moved, mask=is_word)


def copy_pages(
    source: torch.Tensor, source_pages: torch.Tensor | None, target: torch.Tensor, target_pages: torch.Tensor | None
) -> None:
    """Copy pages from one array of them to another bit by bit, in one launch on the current stream.

    Some of a pool's heads are its slice [:, :, first:stop]: only those are read or written.

    Args:
        source, target: [num_pages, 2, Hkv, ...], equal but for num_pages, a head's elements and heads next to each
            other. They must not overlap. The source may lie on another GPU that this one reaches.
        source_pages, target_pages: int64 [n], where the i-th page comes from and goes to; None: the first n in order,
            for one of the two. Pages of the target must differ.
    """
    assert source.dtype == target.dtype
    assert source.shape[1:] == target.shape[1:]
    listed = source_pages if source_pages is not None else target_pages
    assert listed is not None
    if len(listed) == 0:
        return
    sides = [side.flatten(start_dim=2) for side in (source, target)]
    if all(side.stride(1) == side.shape[2] for side in sides):
        # Whole pages are one run each.
        sides = [side.flatten(start_dim=1).unsqueeze(1) for side in sides]
    from_words, to_words = (side.view(_word_type(sides)) for side in sides)
    _, num_runs, run_words = from_words.shape
    chunk = min(_CHUNK_WORDS, next_power_of_2(run_words))
    _copy_pages[len(listed), triton.cdiv(run_words, chunk), num_runs](
        from_words,
        to_words,
        source_pages,
        target_pages,
        from_words.stride(0),
        to_words.stride(0),
        from_words.stride(1),
        to_words.stride(1),
        run_words,
        CHUNK=chunk,
        num_warps=8,
    )


def _word_type(sides: Sequence[torch.Tensor]) -> torch.dtype:
    """The largest type of words that runs [pages, runs, elements] consist of."""
    lengths = [
        number * side.element_size()
        for side in sides
        for number in (side.shape[2], side.stride(0), side.stride(1), side.storage_offset())
    ]
    unit = math.gcd(*lengths)
    return next(dtype for dtype in (torch.int32, torch.int16, torch.int8) if unit % dtype.itemsize == 0)
