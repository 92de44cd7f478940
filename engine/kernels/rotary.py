"""Rotary position embedding, in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.shapes import next_power_of_2


@triton.jit
def _rotate_heads(
    heads_of_token, cosine, sine, num_heads, head_stride, HALF: tl.constexpr, HEADS: tl.constexpr, DIMS: tl.constexpr
):
    """Rotate all heads of one token; cosine and sine are those of its first and second halves [1, DIMS]."""
    heads = tl.arange(0, HEADS)[:, None]
    dims = tl.arange(0, DIMS)[None, :]
    is_element = (heads < num_heads) & (dims < HALF)
    first_at = heads_of_token + heads * head_stride + dims
    second_at = first_at + HALF
    first = tl.load(first_at, mask=is_element, other=0.0).to(tl.float32)
    second = tl.load(second_at, mask=is_element, other=0.0).to(tl.float32)
    dtype = heads_of_token.dtype.element_ty
    tl.store(first_at, (first * cosine[0] - second * sine[0]).to(dtype), mask=is_element)
    tl.store(second_at, (second * cosine[1] + first * sine[1]).to(dtype), mask=is_element)


@triton.jit
def _rotate(
    query,
    key,
    cosine,
    sine,
    num_query_heads,
    num_key_heads,
    query_token_stride,
    query_head_stride,
    key_token_stride,
    key_head_stride,
    HALF: tl.constexpr,
    DIMS: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
):
    """One token's queries and keys. Grid (T,)."""
    token = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, DIMS)[None, :]
    angles = token * (2 * HALF) + dims
    is_angle = dims < HALF
    cosines = (
        tl.load(cosine + angles, mask=is_angle, other=0.0).to(tl.float32),
        tl.load(cosine + angles + HALF, mask=is_angle, other=0.0).to(tl.float32),
    )
    sines = (
        tl.load(sine + angles, mask=is_angle, other=0.0).to(tl.float32),
        tl.load(sine + angles + HALF, mask=is_angle, other=0.0).to(tl.float32),
    )
    queries = query + token * query_token_stride
    _rotate_heads(queries, cosines, sines, num_query_heads, query_head_stride, HALF, QUERY_HEADS, DIMS)
    keys = key + token * key_token_stride
    _rotate_heads(keys, cosines, sines, num_key_heads, key_head_stride, HALF, KEY_HEADS, DIMS)


def rotate(query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> None:
    """Rotate queries and keys in place by their positions' angles, in float32.

    By halves: (a, b) -> (a cos - b sin, b cos + a sin) (RoFormer, Su et al., 2021; GPT-NeoX's pairing).

    Args:
        query: [T, Hq, D]; key: [T, Hkv, D]; a head's elements next to each other.
        cosine, sine: [T, R], contiguous, whatever scaling included; where R is below D, the first R dimensions rotate.
    """
    assert cosine.is_contiguous()
    assert sine.is_contiguous()
    assert query.stride(2) == key.stride(2) == 1
    num_tokens, num_query_heads, _ = query.shape
    if num_tokens == 0:
        return
    half = cosine.shape[1] // 2
    _rotate[(num_tokens,)](
        query,
        key,
        cosine,
        sine,
        num_query_heads,
        key.shape[1],
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        HALF=half,
        DIMS=next_power_of_2(half),
        QUERY_HEADS=next_power_of_2(num_query_heads),
        KEY_HEADS=next_power_of_2(key.shape[1]),
    )
