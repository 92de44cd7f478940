"""The kernels between a layer's products, against torch in float32; bfloat16 is rounded to the nearest."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.cpu_kernels import elementwise
from engine.cpu_kernels.views import elements

DTYPES = [torch.float32, torch.bfloat16]
NONE = np.empty(0, np.float32)


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Float32 to a few units in the last place; bfloat16 to one of them."""
    torch.testing.assert_close(
        actual.float(), expected, rtol=2e-6 if actual.dtype == torch.float32 else 2**-8, atol=1e-6
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(0, 8), (1, 1), (3, 40), (17, 128)])
def test_rms_norm(dtype: torch.dtype, tokens: int, width: int) -> None:
    x, weight = randn(tokens, width, dtype=dtype), randn(width, dtype=torch.float32, seed=1)
    out = torch.empty_like(x)
    elementwise.rms_norm(elements(x), weight.numpy(), np.float32(1e-5), elements(out))
    wide = x.float()
    assert_close(out, wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_multiply_over_the_whole_range(dtype: torch.dtype) -> None:
    gate = torch.tensor([[-200.0, -88.0, -20.0, -1.5, -1e-6, 0.0, 1e-6, 0.3, 7.0, 90.0, 300.0]])
    up = torch.linspace(-2, 2, gate.shape[1])[None]
    gate_up = torch.cat([gate, up], 1).to(dtype)
    out = torch.empty_like(gate, dtype=dtype)
    narrow_gate, narrow_up = gate_up.chunk(2, 1)
    elementwise.silu_multiply(elements(narrow_gate), elements(narrow_up), elements(out))
    wide_gate, wide_up = gate_up.float().chunk(2, 1)
    assert_close(out, torch.nn.functional.silu(wide_gate) * wide_up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 16), (1, 1, 8), (6, 3, 40)])
def test_split_and_rotate(
    dtype: torch.dtype, normalised: bool, num_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    tokens = 5
    qkv = randn(tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    angles = randn(tokens, head_dim, dtype=torch.float32, seed=2)
    cosine, sine = angles.cos().to(dtype), angles.sin().to(dtype)
    weights = [randn(head_dim, dtype=torch.float32, seed=seed) for seed in (3, 4)]
    query = torch.empty(tokens, num_heads, head_dim, dtype=dtype)
    key, value = (torch.empty(tokens, num_kv_heads, head_dim, dtype=dtype) for _ in range(2))
    elementwise.split_and_rotate(
        elements(qkv),
        elements(cosine),
        elements(sine),
        weights[0].numpy() if normalised else NONE,
        weights[1].numpy() if normalised else NONE,
        np.float32(1e-6),
        elements(query),
        elements(key),
        elements(value),
    )
    parts = qkv.float().split([head * head_dim for head in (num_heads, num_kv_heads, num_kv_heads)], 1)
    heads = [part.unflatten(1, (-1, head_dim)) for part in parts]
    for actual, wide, weight in zip((query, key), heads, weights, strict=False):
        if normalised:
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * weight
        first, second = wide.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
        assert_close(actual, wide * cosine.float()[:, None] + turned * sine.float()[:, None])
    assert torch.equal(value.float(), heads[2])


def test_rounding_to_bfloat16_is_torchs() -> None:
    """Ties to even, through a norm that multiplies by one."""
    x = randn(1, 4096, dtype=torch.bfloat16)
    weight = np.ones(4096, np.float32)
    out, wide = torch.empty_like(x), torch.empty(1, 4096)
    elementwise.rms_norm(elements(x), weight, np.float32(0), elements(out))
    elementwise.rms_norm(elements(x.float()), weight, np.float32(0), elements(wide))
    assert torch.equal(out, wide.bfloat16())
