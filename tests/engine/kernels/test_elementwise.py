"""Norms, rotation and the gate are computed in float32 and rounded once."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.gate import silu_multiply
from engine.kernels.norm import rms_norm
from engine.kernels.rotary import rotate
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
@pytest.mark.parametrize("rotated", [32, 12])
def test_rotate(dtype: torch.dtype, rotated: int) -> None:
    """All of a head's dimensions, and its first ones alone."""
    query, key = random(5, 3, 32, dtype=dtype).transpose(0, 1), random(3, 2, 32, dtype=dtype, seed=1)
    cosine, sine = random(3, rotated, dtype=dtype, seed=2), random(3, rotated, dtype=dtype, seed=3)
    exact = [turned(each, cosine, sine) for each in (query, key)]
    rotate(query, key, cosine, sine)
    close(query, exact[0])
    close(key, exact[1])


def turned(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    width = cosine.shape[1]
    first, second = heads[..., :width].double().chunk(2, dim=-1)
    swapped = torch.cat([-second, first], dim=-1)
    rotated = torch.cat([first, second], dim=-1) * cosine[:, None].double() + swapped * sine[:, None].double()
    return torch.cat([rotated, heads[..., width:].double()], dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_multiply_takes_the_halves_of_a_projection(dtype: torch.dtype) -> None:
    gate, up = random(2, 2400, dtype=dtype).chunk(2, dim=1)
    close(silu_multiply(gate, up), torch.nn.functional.silu(gate.double()) * up.double())


def test_no_rows_launch_nothing() -> None:
    empty = torch.zeros(0, 16, device=DEVICE)
    assert rms_norm(empty, empty.new_ones(16), epsilon=1e-5).shape == (0, 16)
    assert silu_multiply(empty, empty).shape == (0, 16)
    rotate(empty.view(0, 1, 16), empty.view(0, 1, 16), empty, empty)
