from __future__ import annotations

import numpy as np
import pytest
import torch
import xxhash

from kvtransfer.pages import PageMemory
from tests.kvtransfer.sides import HYBRID, random_pages

ORDERS = [[3], [3, 4, 5], [5, 4, 3], [1, 9, 2, 3, 4, 15], [2, 4, 6, 8], [1, 3, 2, 4]]


@pytest.fixture
def pages() -> np.ndarray:
    return random_pages(HYBRID, 16, seed=0)


@pytest.mark.parametrize("order", ORDERS)
def test_copy_out_reads_pages_in_the_order_given(pages: np.ndarray, order: list[int]) -> None:
    out = np.zeros(len(order) * HYBRID.page_bytes, dtype=np.uint8)
    PageMemory(pages).copy_out(1, np.array(order), out)
    assert out.tobytes() == pages[1, order].tobytes()


@pytest.mark.parametrize("order", ORDERS)
def test_copy_in_writes_these_pages_and_no_other(pages: np.ndarray, order: list[int]) -> None:
    payload = np.random.default_rng(1).integers(0, 256, len(order) * HYBRID.page_bytes, dtype=np.uint8)
    expected = pages.copy()
    expected[2, order] = payload.reshape(len(order), -1)
    PageMemory(pages).copy_in(2, np.array(order), payload)
    np.testing.assert_array_equal(pages, expected)


@pytest.mark.parametrize("order", ORDERS)
def test_checksum_and_views_are_those_of_the_joined_pages(pages: np.ndarray, order: list[int]) -> None:
    memory = PageMemory(pages)
    joined = pages[0, order].tobytes()
    assert memory.checksum(0, np.array(order)) == xxhash.xxh3_64_intdigest(joined)
    assert b"".join(memory.views(0, np.array(order))) == joined


def test_consecutive_blocks_are_one_view(pages: np.ndarray) -> None:
    sizes = [len(view) for view in PageMemory(pages).views(0, np.array([1, 2, 3, 8, 9, 4]))]
    assert sizes == [3 * HYBRID.page_bytes, 2 * HYBRID.page_bytes, HYBRID.page_bytes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pool_tensor_is_viewed_not_copied(dtype: torch.dtype) -> None:
    pool = torch.zeros(HYBRID.pool_shape(4), dtype=dtype)
    memory = PageMemory.from_pool(pool)
    assert (memory.num_slots, memory.num_blocks, memory.page_bytes) == (3, 4, pool[0, 0].nbytes)
    ones = torch.ones_like(pool[1, 2]).flatten().view(torch.uint8).numpy()
    memory.copy_in(1, np.array([2]), ones)
    assert bool((pool[1, 2] == 1).all())
    assert float(pool.sum()) == pool[1, 2].numel()


def test_an_array_of_another_shape_is_refused(pages: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        PageMemory(pages[:, ::2])
    with pytest.raises(ValueError, match="uint8"):
        PageMemory(pages.view(np.int8))
