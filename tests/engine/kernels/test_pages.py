"""Keys, values and whole blocks arrive where they belong, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.pages import gather_blocks, scatter_blocks, write
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_pass_through_a_buffer_whole(dtype: torch.dtype) -> None:
    """Pages of 3 kB: several programs each, the last one not full. A block id below 0 leaves its place alone."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(2, 6, 2, 3, 16, 12, generator=generator).to(dtype).to(DEVICE)
    buffer = torch.zeros(3, 2, 2, 3, 16, 12, dtype=dtype, device=DEVICE)
    gather_blocks(pool, torch.tensor([4, -1, 2], device=DEVICE), buffer)
    assert torch.equal(buffer[0], pool[:, 4])
    assert not buffer[1].any()
    assert torch.equal(buffer[2], pool[:, 2])
    other = torch.zeros_like(pool)
    scatter_blocks(buffer, torch.tensor([1, -1, 5], device=DEVICE, dtype=torch.int32), other)
    assert torch.equal(other[:, [1, 5]], pool[:, [4, 2]])
    assert not other[:, [0, 2, 3, 4]].any()


def test_no_tokens_and_no_blocks_launch_nothing() -> None:
    pages = torch.zeros(1, 2, 1, 2, 8, device=DEVICE)
    nothing = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    write(pages.new_zeros(0, 1, 8), pages.new_zeros(0, 1, 8), pages, nothing)
    gather_blocks(pages[None], nothing, pages.new_zeros(0, 1, 2, 1, 2, 8))
    assert not pages.any()
