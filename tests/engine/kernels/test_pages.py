"""Keys, values and pages arrive where they belong, and nothing else changes."""

from __future__ import annotations

import math

import pytest
import torch

from engine.kernels.pages import copy_pages, write
from tests.engine.kernels.interpreter import DEVICE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_write_stores_tokens_and_skips_those_without_a_slot(dtype: torch.dtype) -> None:
    """Three heads of 24 dimensions: no powers of two. Keys have the strides of a model's transposed heads."""
    key = torch.randn(3, 5, 24).to(dtype).transpose(0, 1)
    value = torch.randn(5, 3, 24).to(dtype)
    pages = torch.full((4, 2, 3, 8, 24), float("nan"), dtype=dtype)
    slots = torch.tensor([9, -1, 31, 8, 15])
    expected = pages.clone()
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[slot // 8, 0, :, slot % 8] = key[token]
            expected[slot // 8, 1, :, slot % 8] = value[token]
    actual = pages.to(DEVICE)
    write(key.to(DEVICE), value.to(DEVICE), actual, slots.to(DEVICE))
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def test_write_rounds_to_the_dtype_of_the_pages() -> None:
    key = torch.randn(2, 1, 8, device=DEVICE)
    pages = torch.zeros(1, 2, 1, 2, 8, dtype=torch.bfloat16, device=DEVICE)
    write(key, key, pages, torch.tensor([0, 1], device=DEVICE))
    assert torch.equal(pages[0, 0, 0], key[:, 0].bfloat16())


@pytest.mark.parametrize(
    ("dtype", "head_shape"),
    # Pages of several programs, the last one not full; and toys that are no whole words.
    [(torch.float32, (256, 12)), (torch.bfloat16, (16, 12)), (torch.bfloat16, (1, 3)), (torch.uint8, (5, 1))],
    ids=str,
)
@pytest.mark.parametrize("heads", [(0, 3), (1, 2), (0, 1)], ids=str)
def test_some_heads_of_pages_pass_through_a_buffer(
    dtype: torch.dtype, head_shape: tuple[int, int], heads: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    pool = _bits((12, 2, 3, *head_shape), dtype, generator)
    first, count = heads
    chosen = slice(first, first + count)
    pages = torch.tensor([4, 11, 2], device=DEVICE)
    buffer = _bits((4, 2, count, *head_shape), dtype, generator)
    beyond = buffer[3].clone()
    copy_pages(pool[:, :, chosen], pages, buffer, None)
    assert _equal(buffer[:3], pool[pages][:, :, chosen])
    assert _equal(buffer[3], beyond)

    other = _bits((8, 2, 3, *head_shape), dtype, generator)
    targets = torch.tensor([1, 5, 0], device=DEVICE)
    expected = other.clone()
    expected[targets, :, chosen] = buffer[:3]
    copy_pages(buffer, None, other[:, :, chosen], targets)
    assert _equal(other, expected)


def test_pages_pass_between_pools_whose_heads_begin_elsewhere() -> None:
    generator = torch.Generator().manual_seed(1)
    source = _bits((6, 2, 4, 16, 8), torch.bfloat16, generator)
    target = _bits((9, 2, 2, 16, 8), torch.bfloat16, generator)
    expected = target.clone()
    expected[[7, 3], :, 1:] = source[[5, 1], :, 2:3]
    pages = (torch.tensor([5, 1], device=DEVICE), torch.tensor([7, 3], device=DEVICE))
    copy_pages(source[:, :, 2:3], pages[0], target[:, :, 1:], pages[1])
    assert _equal(target, expected)


def _bits(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Random bits, so that there are NaNs of all kinds among them."""
    num_bytes = math.prod(shape) * dtype.itemsize
    return (
        torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator).view(dtype).view(shape).to(DEVICE)
    )


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit by bit."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def test_no_tokens_and_no_pages_launch_nothing() -> None:
    pages = torch.zeros(1, 2, 1, 2, 8, device=DEVICE)
    nothing = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    write(pages.new_zeros(0, 1, 8), pages.new_zeros(0, 1, 8), pages, nothing)
    copy_pages(pages, nothing, pages.new_zeros(0, 2, 1, 2, 8), None)
    assert not pages.any()
