"""What a decoder layer does between its matrix products and attention: norms, rotation, the gate of its MLP.

Rows are tokens. Sums and products are taken in float32 whatever the rows hold, and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba.core import types
from numba.extending import overload

from engine.cpu_kernels.arithmetic import ONE, ZERO, FloatArray, PageArray, exp, widen
from engine.cpu_kernels.compiling import inlined_kernel, kernel


def narrow(number: Any, like: Any) -> Any:
    """A float32 as an element of the array `like`, rounded to the nearest; only ever compiled."""


def narrow_by_type(number: Any, like: Any) -> Callable[[Any, Any], Any]:
    def round_to_bfloat16(number: Any, like: Any) -> Any:
        bits = np.float32(number).view(np.uint32)
        return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

    def keep(number: Any, like: Any) -> Any:
        return number

    return round_to_bfloat16 if like.dtype == types.uint16 else keep


overload(narrow, inline="always", strict=False)(narrow_by_type)


@inlined_kernel
def _inverse_rms(row: PageArray, start: int, stop: int, epsilon: np.float32) -> np.float32:
    """1 / sqrt(mean of squares + epsilon) of row[start:stop]."""
    total = ZERO
    for index in range(start, stop):
        element = widen(row[index])
        total += element * element
    scale: np.float32 = ONE / np.sqrt(total / np.float32(stop - start) + epsilon)
    return scale


@kernel
def rms_norm(x: PageArray, weight: FloatArray, epsilon: np.float32, out: PageArray) -> None:
    """out = x / rms(x) * weight for each row; x, out [T, H], weight [H] (Zhang and Sennrich, 2019)."""
    for token in range(x.shape[0]):
        scale = _inverse_rms(x[token], 0, x.shape[1], epsilon)
        for index in range(x.shape[1]):
            out[token, index] = narrow(widen(x[token, index]) * scale * weight[index], out)


@kernel
def rotate_head(
    row: PageArray,
    start: int,
    cosine: PageArray,
    sine: PageArray,
    weight: FloatArray,
    epsilon: np.float32,
    target: PageArray,
) -> None:
    """Normalise one head of a token if there are weights, then rotate it by its position.

    Rotation by halves: (a, b) -> (a cos - b sin, b cos + a sin) (RoFormer, Su et al., 2021; GPT-NeoX's pairing).

    Args:
        row: holds the head at start:+D.
        cosine, sine: [D], whatever scaling included.
        weight: [D] of the heads' RMS norm; [0] for none.
        target: [D]; written.
    """
    head_dim = target.shape[0]
    half = head_dim // 2
    scale = _inverse_rms(row, start, start + head_dim, epsilon) if weight.shape[0] else ONE
    for d in range(half):
        first, second = widen(row[start + d]) * scale, widen(row[start + half + d]) * scale
        if weight.shape[0]:
            first, second = first * weight[d], second * weight[half + d]
        target[d] = narrow(first * widen(cosine[d]) - second * widen(sine[d]), target)
        target[half + d] = narrow(second * widen(cosine[half + d]) + first * widen(sine[half + d]), target)


@kernel
def split_and_rotate(
    qkv: PageArray,
    cosine: PageArray,
    sine: PageArray,
    query_weight: FloatArray,
    key_weight: FloatArray,
    epsilon: np.float32,
    query: PageArray,
    key: PageArray,
    value: PageArray,
) -> None:
    """Take a fused projection apart, and do to each head of queries and keys as `rotate_head`.

    Args:
        qkv: [T, (Hq + 2 Hkv) D], the heads of queries, keys and values in this order.
        cosine, sine: [T, D].
        query_weight, key_weight: [D] or [0].
        query: [T, Hq, D]; key, value: [T, Hkv, D]; written.
    """
    num_heads, num_kv_heads, head_dim = query.shape[1], key.shape[1], query.shape[2]
    for token in range(qkv.shape[0]):
        row, cosine_row, sine_row = qkv[token], cosine[token], sine[token]
        for head in range(num_heads):
            rotate_head(row, head * head_dim, cosine_row, sine_row, query_weight, epsilon, query[token, head])
        start = num_heads * head_dim
        for head in range(num_kv_heads):
            rotate_head(row, start + head * head_dim, cosine_row, sine_row, key_weight, epsilon, key[token, head])
        start += num_kv_heads * head_dim
        for head in range(num_kv_heads):
            for d in range(head_dim):
                value[token, head, d] = row[start + head * head_dim + d]


@kernel
def silu_multiply(gate: PageArray, up: PageArray, out: PageArray) -> None:
    """out = silu(gate) * up, with silu(x) = x / (1 + exp(-x)) (Shazeer, "GLU Variants", 2020).

    Args:
        gate, up: [T, I] or wider; out: [T, I].
    """
    for token in range(out.shape[0]):
        for index in range(out.shape[1]):
            x, factor = widen(gate[token, index]), widen(up[token, index])
            # exp is good for what is not positive: sigmoid(x) = (1 or e^-|x|) / (1 + e^-|x|).
            decay = exp(-abs(x))
            numerator = ONE if x >= ZERO else decay
            out[token, index] = narrow(x * factor * numerator / (ONE + decay), out)
