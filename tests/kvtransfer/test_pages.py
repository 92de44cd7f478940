from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import xxhash

from kvtransfer.checked_copy import LINE_BYTES
from kvtransfer.message import new_message
from kvtransfer.pages import PageMemory
from tests.kvtransfer.sides import HYBRID

ORDERS = [[3], [3, 4, 5], [5, 4, 3], [1, 9, 2, 3, 4, 15], [2, 4, 6, 8], [1, 3, 2, 4]]


# Pages as toys and as models have them; the last ones do not begin at a cache line.
@pytest.fixture(params=[(256, 0), (1024, 0), (3072, 0), (2048, 8)], ids=str)
def pages(request: pytest.FixtureRequest) -> np.ndarray:
    page_bytes, misaligned = request.param
    shape = (3, 16, page_bytes)
    memory = np.random.default_rng(0).integers(0, 256, math.prod(shape) + 2 * LINE_BYTES, dtype=np.uint8)
    start = -memory.ctypes.data % LINE_BYTES + misaligned
    return memory[start : start + math.prod(shape)].reshape(shape)


@pytest.mark.parametrize("order", ORDERS)
def test_copy_out_reads_pages_in_the_order_given(pages: np.ndarray, order: list[int]) -> None:
    out = np.zeros(len(order) * pages.shape[2], dtype=np.uint8)
    checksum = PageMemory(pages).copy_out(1, np.array(order), out)
    assert out.tobytes() == pages[1, order].tobytes()
    assert checksum == xxhash.xxh3_64_intdigest(out.data)


@pytest.mark.parametrize("order", ORDERS)
def test_copy_in_writes_these_pages_and_no_other(pages: np.ndarray, order: list[int]) -> None:
    payload = np.random.default_rng(1).integers(0, 256, len(order) * pages.shape[2], dtype=np.uint8)
    expected = pages.copy()
    expected[2, order] = payload.reshape(len(order), -1)
    # What came in a message cannot be written.
    for received in (payload, np.frombuffer(payload.tobytes(), dtype=np.uint8)):
        checksum = PageMemory(pages).copy_in(2, np.array(order), received)
        np.testing.assert_array_equal(pages, expected)
        assert checksum == xxhash.xxh3_64_intdigest(payload.data)
        pages[2, order] = 0


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


def test_a_message_is_filled_in_place() -> None:
    message, content = new_message(5)
    content[:] = np.frombuffer(b"baton", dtype=np.uint8)
    assert message == b"baton"
    del content
    assert message == b"baton"
