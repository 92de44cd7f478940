"""Products are those of float64, rounded once, and a row's bits are its own."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.matmul import matmul
from tests.engine.kernels.interpreter import DEVICE
from tests.engine.kernels.test_elementwise import DTYPES, random


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [72, 71])
def test_multiplies_and_adds(dtype: torch.dtype, depth: int) -> None:
    """Of a width that descriptors copy, and of one that they do not; no dimension is a multiple of a tile's."""
    x, weight = random(21, depth, dtype=dtype), random(130, depth, dtype=dtype, seed=1)
    bias, residual = random(130, dtype=dtype, seed=2), random(21, 130, dtype=dtype, seed=3)
    product = x.double() @ weight.double().T
    spacing = torch.finfo(dtype).eps
    torch.testing.assert_close(matmul(x, weight).double(), product, rtol=spacing, atol=1e-5)
    exact = product + bias.double() + residual.double()
    assert matmul(x, weight, bias, residual=residual) is residual
    torch.testing.assert_close(residual.double(), exact, rtol=spacing, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_others_to_the_bit(dtype: torch.dtype) -> None:
    x, weight = random(50, 136, dtype=dtype), random(33, 136, dtype=dtype, seed=1)
    every = matmul(x, weight)
    for first, last in ((0, 1), (17, 18), (3, 40), (20, 50)):
        assert torch.equal(matmul(x[first:last], weight), every[first:last])


def test_no_rows_launch_nothing() -> None:
    assert matmul(torch.zeros(0, 16, device=DEVICE), torch.zeros(8, 16, device=DEVICE)).shape == (0, 8)
