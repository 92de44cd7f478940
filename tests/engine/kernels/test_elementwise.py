"""Norms, rotation and the gate are computed in float32 and rounded once."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.gate import apply_gate
from engine.kernels.norm import rms_norm
from engine.kernels.rotary import rotate_and_write
from tests.engine.kernels.interpreter import DEVICE

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def close(actual: torch.Tensor, exact: torch.Tensor) -> None:
    """But for the last bit of float32, `actual` is `exact` rounded."""
    spacing = 2 * torch.finfo(actual.dtype).eps if actual.dtype == torch.float32 else torch.finfo(actual.dtype).eps / 2
    torch.testing.assert_close(actual.double(), exact.double(), rtol=1.01 * spacing, atol=1e-6)


def normalised(x: torch.Tensor, weight: torch.Tensor, offset: float) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (weight.double() + offset)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype: torch.dtype) -> None:
    x = random(3, 200, dtype=dtype)[:, :100]
    weight = random(100, dtype=dtype, seed=1)
    close(rms_norm(x, weight, epsilon=1e-5), normalised(x, weight, 0.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_is_of_the_residual_stream_as_stored(dtype: torch.dtype) -> None:
    x, residual = random(3, 96, dtype=dtype), random(3, 96, dtype=dtype, seed=1)
    weight, stream = random(96, dtype=dtype, seed=2), x + residual
    out = rms_norm(x, weight, epsilon=1e-5, residual=residual, weight_offset=1.0)
    assert torch.equal(residual, stream)
    close(out, normalised(stream, weight, 1.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rotated", "normed"), [(24, False), (24, True), (12, True)])
def test_rotate_and_write(dtype: torch.dtype, rotated: int, normed: bool) -> None:
    """All of a head's dimensions, and its first ones alone; two key heads, each shared by three query heads."""
    qkv, pages = random(3, 10 * 24, dtype=dtype), torch.full((3, 2, 2, 4, 24), float("nan"), dtype=dtype, device=DEVICE)
    cosine, sine = random(3, rotated, dtype=dtype, seed=2), random(3, rotated, dtype=dtype, seed=3)
    norms = [random(24, dtype=dtype, seed=seed) for seed in (4, 5)] if normed else [None, None]
    query, key, value = qkv.clone().view(3, 10, 24).split([6, 2, 2], 1)
    exact = [
        turned(heads.double() if norm is None else normalised(heads, norm, 0.0), cosine, sine)
        for heads, norm in zip((query, key), norms, strict=True)
    ]
    slots = torch.tensor([5, -1, 10], device=DEVICE)
    rotated_query = rotate_and_write(
        qkv, cosine, sine, pages, slots, query_norm=norms[0], key_norm=norms[1], epsilon=1e-5
    )
    assert rotated_query.data_ptr() == qkv.data_ptr()
    close(rotated_query, exact[0])
    for token, (block, offset) in {0: (1, 1), 2: (2, 2)}.items():
        close(pages[block, 0, :, offset], exact[1][token])
        assert torch.equal(pages[block, 1, :, offset], value[token])
    assert pages.isfinite().sum() == 2 * 2 * 2 * 24


def turned(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    width = cosine.shape[1]
    first, second = heads[..., :width].chunk(2, dim=-1)
    swapped = torch.cat([-second, first], dim=-1)
    rotated = heads[..., :width] * cosine[:, None].double() + swapped * sine[:, None].double()
    return torch.cat([rotated, heads[..., width:]], dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gate_takes_the_halves_of_a_projection(dtype: torch.dtype) -> None:
    gate, up = random(2, 2400, dtype=dtype).chunk(2, dim=1)
    close(apply_gate(gate, up), torch.nn.functional.silu(gate.double()) * up.double())
    gelu = torch.nn.functional.gelu(gate.double(), approximate="tanh")
    close(apply_gate(gate, up, "gelu_tanh"), gelu * up.double())


def test_no_rows_launch_nothing() -> None:
    empty = torch.zeros(0, 16, device=DEVICE)
    assert rms_norm(empty, empty.new_ones(16), epsilon=1e-5).shape == (0, 16)
    assert apply_gate(empty, empty).shape == (0, 16)
    pages = torch.zeros(1, 2, 1, 2, 16, device=DEVICE)
    assert rotate_and_write(empty.new_zeros(0, 48), empty, empty, pages, empty.long()).shape == (0, 1, 16)
