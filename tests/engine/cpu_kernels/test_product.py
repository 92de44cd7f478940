"""Products over panels, against torch; any number of rows, columns and depth."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.cpu_kernels.product import multiply_all, pack
from engine.cpu_kernels.threads import use_threads


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    panels, biases = pack(weight.numpy(), None if bias is None else bias.numpy())
    out = torch.full((len(x), len(weight)), float("nan"))
    multiply_all(x.numpy(), panels, biases, out.numpy(), use_threads())
    return out


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_bfloat16", [False, True])
@pytest.mark.parametrize(("rows", "width", "depth"), [(0, 16, 8), (1, 1, 1), (5, 16, 300), (13, 40, 256), (257, 70, 9)])
def test_is_torchs(rows: int, width: int, depth: int, is_bfloat16: bool, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, depth, generator=generator), torch.randn(width, depth, generator=generator)
    if is_bfloat16:
        weight = weight.bfloat16().float()
    bias = torch.randn(width, generator=generator) if has_bias else None
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(product(x, weight, bias).double(), expected, rtol=1e-5, atol=1e-4)


def test_weights_stay_in_bfloat16_only_where_that_is_exact() -> None:
    weight = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    assert pack(weight.numpy(), None)[0].dtype == np.uint16
    weight[3, 5] += 2**-20
    assert pack(weight.numpy(), None)[0].dtype == np.float32


def test_a_row_is_the_same_to_the_bit_in_any_company() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(140, 300, generator=generator), torch.randn(40, 300, generator=generator)
    together = product(x, weight, None)
    for start, stop in ((0, 1), (7, 12), (100, 140)):
        assert torch.equal(product(x[start:stop].contiguous(), weight, None), together[start:stop])
