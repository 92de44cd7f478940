"""What lies between a layer's fused projection and its attention: head norms, rotary embedding, and the KV write."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.shapes import next_power_of_2

# Elements of queries for which a program gets a warp.
_ELEMENTS_OF_WARP = 256
_MAX_WARPS = 8


@triton.jit
def _turn(
    source,
    target,
    heads,
    is_head,
    cosine,
    sine,
    norm,
    epsilon,
    HAS_NORM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    DIMS: tl.constexpr,
    REST: tl.constexpr,
    REST_DIMS: tl.constexpr,
):
    """Normalise and rotate heads [HEADS, 1] of one token, HEAD_DIM apart from each other, from `source` to `target`.

    Cosine and sine are those of the first and of the second half of the REST-less dimensions, [1, DIMS] each.
    """
    dims = tl.arange(0, DIMS)[None, :]
    is_first = is_head & (dims < HALF)
    at = heads * HEAD_DIM + dims
    first = tl.load(source + at, mask=is_first, other=0.0).to(tl.float32)
    second = tl.load(source + at + HALF, mask=is_first, other=0.0).to(tl.float32)
    rest_dims = tl.arange(0, REST_DIMS)[None, :]
    rest_at = heads * HEAD_DIM + 2 * HALF + rest_dims
    is_rest = is_head & (rest_dims < REST)
    if REST:
        rest = tl.load(source + rest_at, mask=is_rest, other=0.0).to(tl.float32)
    if HAS_NORM:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        if REST:
            squares += tl.sum(rest * rest, 1)
        inverse_rms = tl.rsqrt(squares / HEAD_DIM + epsilon)[:, None]
        is_dim = dims < HALF
        first = first * inverse_rms * tl.load(norm + dims, mask=is_dim, other=0.0).to(tl.float32)
        second = second * inverse_rms * tl.load(norm + HALF + dims, mask=is_dim, other=0.0).to(tl.float32)
        if REST:
            scale = tl.load(norm + 2 * HALF + rest_dims, mask=rest_dims < REST, other=0.0).to(tl.float32)
            rest = rest * inverse_rms * scale
    dtype = target.dtype.element_ty
    tl.store(target + at, (first * cosine[0] - second * sine[0]).to(dtype), mask=is_first)
    tl.store(target + at + HALF, (second * cosine[1] + first * sine[1]).to(dtype), mask=is_first)
    if REST:
        tl.store(target + rest_at, rest.to(dtype), mask=is_rest)


@triton.jit
def _rotate_and_write(
    qkv,
    cosine,
    sine,
    query_norm,
    key_norm,
    pages,
    slots,
    token_stride,
    epsilon,
    HAS_NORM: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    DIMS: tl.constexpr,
    REST: tl.constexpr,
    REST_DIMS: tl.constexpr,
):
    """One token's key and value of one head, and the GROUP query heads that share them. Grid (T, Hkv)."""
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    num_kv_heads = tl.num_programs(1)
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
    row = qkv + token * token_stride
    heads = tl.arange(0, HEADS)[:, None]
    queries = row + kv_head * (GROUP * HEAD_DIM)
    _turn(
        queries, queries, heads, heads < GROUP, cosines, sines, query_norm, epsilon, HAS_NORM, HEAD_DIM, HALF, DIMS,
        REST, REST_DIMS,
    )  # fmt: skip
    slot = tl.load(slots + token)
    if slot < 0:
        return
    side = num_kv_heads * BLOCK_SIZE * HEAD_DIM
    key_at = pages + slot // BLOCK_SIZE * (2 * side) + (kv_head * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM
    key = row + (num_kv_heads * GROUP + kv_head) * HEAD_DIM
    only = tl.zeros((1, 1), dtype=tl.int32)
    _turn(
        key, key_at, only, only == 0, cosines, sines, key_norm, epsilon, HAS_NORM, HEAD_DIM, HALF, DIMS, REST,
        REST_DIMS,
    )  # fmt: skip
    elements = tl.arange(0, WIDTH)
    value = tl.load(key + num_kv_heads * HEAD_DIM + elements, mask=elements < HEAD_DIM, other=0.0)
    tl.store(key_at + side + elements, value.to(pages.dtype.element_ty), mask=elements < HEAD_DIM)


def rotate_and_write(
    qkv: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    pages: torch.Tensor,
    slots: torch.Tensor,
    *,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    epsilon: float = 0.0,
) -> torch.Tensor:
    """Rotate queries in place and keys on their way into the pages, values beside them; in float32, rounded once.

    By halves: (a, b) -> (a cos - b sin, b cos + a sin) (RoFormer, Su et al., 2021; GPT-NeoX's pairing), after an RMS
    norm of each head where there are weights for it (Qwen 3).

    Args:
        qkv: [T, (Hq + 2 Hkv) * D]; a token's query heads, then its keys, then its values.
        cosine, sine: [T, R], contiguous, whatever scaling included; where R is below D, the first R dimensions rotate.
        pages: [num_blocks, 2, Hkv, B, D], contiguous.
        slots: int64 [T]; block * B + offset of each token; keys and values of one below 0 are not written.
        query_norm, key_norm: [D]; both or neither.
        epsilon: of the norms.

    Returns:
        The queries, [T, Hq, D]: a view of `qkv`.
    """
    num_kv_heads, block_size, head_dim = pages.shape[2:]
    num_tokens, num_columns = qkv.shape
    num_heads = num_columns // head_dim - 2 * num_kv_heads
    assert qkv.stride(1) == 1
    assert cosine.is_contiguous()
    assert sine.is_contiguous()
    assert pages.is_contiguous()
    assert (query_norm is None) == (key_norm is None)
    queries = qkv[:, : num_heads * head_dim].view(num_tokens, num_heads, head_dim)
    if num_tokens == 0:
        return queries
    group, half = num_heads // num_kv_heads, cosine.shape[1] // 2
    heads, dims, rest = next_power_of_2(group), next_power_of_2(half), head_dim - 2 * half
    _rotate_and_write[num_tokens, num_kv_heads](
        qkv,
        cosine,
        sine,
        query_norm,
        key_norm,
        pages,
        slots,
        qkv.stride(0),
        epsilon,
        HAS_NORM=query_norm is not None,
        GROUP=group,
        HEADS=heads,
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        WIDTH=next_power_of_2(head_dim),
        HALF=half,
        DIMS=dims,
        REST=rest,
        REST_DIMS=next_power_of_2(max(rest, 1)),
        num_warps=min(_MAX_WARPS, max(1, heads * dims // _ELEMENTS_OF_WARP)),
    )
    return queries
