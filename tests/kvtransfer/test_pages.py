from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.checked_copy import LINE_BYTES
from kvtransfer.message import new_message
from kvtransfer.pages import HeadRange, HostPages, pool_memory
from tests.kvtransfer.sides import HYBRID

ORDERS = [[3], [3, 4, 5], [5, 4, 3], [1, 9, 2, 3, 4, 15], [2, 4, 6, 8], [1, 3, 2, 4]]
HEADS = HeadRange(0, 2)


# Pages as toys and as models have them; the last ones do not begin at a cache line.
@pytest.fixture(params=[(256, 0), (1024, 0), (3072, 0), (2048, 8)], ids=str)
def pages(request: pytest.FixtureRequest) -> np.ndarray:
    page_bytes, misaligned = request.param
    return aligned((3, 16, page_bytes), misaligned)


def aligned(shape: tuple[int, int, int], misaligned: int = 0) -> np.ndarray:
    """Random pages that begin `misaligned` bytes behind the begin of a cache line."""
    memory = np.random.default_rng(0).integers(0, 256, math.prod(shape) + 2 * LINE_BYTES, dtype=np.uint8)
    start = -memory.ctypes.data % LINE_BYTES + misaligned
    return memory[start : start + math.prod(shape)].reshape(shape)


@pytest.mark.parametrize("order", ORDERS)
def test_copy_out_reads_pages_in_the_order_given(pages: np.ndarray, order: list[int]) -> None:
    out = np.zeros(len(order) * pages.shape[2], dtype=np.uint8)
    checksum = HostPages(pages, HEADS).copy_out(1, np.array(order), HEADS, out)
    assert out.tobytes() == pages[1, order].tobytes()
    assert checksum == xxhash.xxh3_64_intdigest(out.data)


@pytest.mark.parametrize("order", ORDERS)
def test_copy_in_writes_these_pages_and_no_other(pages: np.ndarray, order: list[int]) -> None:
    payload = np.random.default_rng(1).integers(0, 256, len(order) * pages.shape[2], dtype=np.uint8)
    expected = pages.copy()
    expected[2, order] = payload.reshape(len(order), -1)
    # What came in a message cannot be written.
    for received in (payload, np.frombuffer(payload.tobytes(), dtype=np.uint8)):
        checksum = HostPages(pages, HEADS).copy_in(2, np.array(order), HEADS, received)
        np.testing.assert_array_equal(pages, expected)
        assert checksum == xxhash.xxh3_64_intdigest(payload.data)
        pages[2, order] = 0


@st.composite
def head_ranges(draw: st.DrawFn) -> tuple[HeadRange, HeadRange]:
    """What pages hold, and some of it."""
    held = HeadRange(draw(st.sampled_from([0, 4])), draw(st.sampled_from([1, 2, 4, 8])))
    first = draw(st.integers(held.first, held.stop - 1))
    return held, HeadRange(first, draw(st.integers(1, held.stop - first)))


@settings(max_examples=60)
@given(
    ranges=head_ranges(),
    # Bytes of K or V of one head: runs that the kernel takes, none, and some of each.
    value_bytes=st.sampled_from([32, 512, 1024, 1536, 2048]),
    misaligned=st.sampled_from([0, 8]),
    order=st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True),
)
def test_a_range_of_heads_is_a_slice_of_each_page(
    ranges: tuple[HeadRange, HeadRange], value_bytes: int, misaligned: int, order: list[int]
) -> None:
    held, heads = ranges
    pages = aligned((2, 6, 2 * held.count * value_bytes), misaligned)
    memory = HostPages(pages, held)
    assert memory.head_bytes == 2 * value_bytes
    by_head = pages.reshape(2, 6, 2, held.count, value_bytes)
    first = heads.first - held.first
    wanted = by_head[1, order][:, :, first : first + heads.count]

    out = np.zeros(len(order) * heads.count * memory.head_bytes, dtype=np.uint8)
    assert memory.copy_out(1, np.array(order), heads, out) == xxhash.xxh3_64_intdigest(out.data)
    assert out.tobytes() == wanted.tobytes()

    payload = np.random.default_rng(1).integers(0, 256, len(out), dtype=np.uint8)
    expected = by_head.copy()
    for place, block in enumerate(order):
        expected[0, block, :, first : first + heads.count] = payload.reshape(wanted.shape)[place]
    assert memory.copy_in(0, np.array(order), heads, payload) == xxhash.xxh3_64_intdigest(payload.data)
    np.testing.assert_array_equal(by_head, expected)


@pytest.mark.parametrize(
    ("ours", "theirs", "common"),
    [((0, 8), (2, 2), (2, 2)), ((4, 4), (0, 8), (4, 4)), ((0, 4), (2, 4), (2, 2)), ((0, 4), (4, 4), (4, 0))],
)
def test_head_ranges_overlap(ours: tuple[int, int], theirs: tuple[int, int], common: tuple[int, int]) -> None:
    assert HeadRange(*ours).overlap(HeadRange(*theirs)) == HeadRange(*common)
    assert HeadRange(*ours).holds(HeadRange(*theirs)) == (common == theirs)
    assert not HeadRange(*ours).holds(HeadRange(ours[0], 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pool_tensor_is_viewed_not_copied(dtype: torch.dtype) -> None:
    pool = torch.zeros(HYBRID.pool_shape(4), dtype=dtype)
    memory = pool_memory(pool)
    assert (memory.num_slots, memory.num_blocks, memory.page_bytes) == (3, 4, pool[0, 0].nbytes)
    assert memory.heads == HeadRange(0, HYBRID.num_kv_heads)
    ones = torch.ones_like(pool[1, 2]).flatten().view(torch.uint8).numpy()
    memory.copy_in(1, np.array([2]), memory.heads, ones)
    assert bool((pool[1, 2] == 1).all())
    assert float(pool.sum()) == pool[1, 2].numel()


def test_an_array_of_another_shape_is_refused(pages: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        HostPages(pages[:, ::2], HEADS)
    with pytest.raises(ValueError, match="uint8"):
        HostPages(pages.view(np.int8), HEADS)
    with pytest.raises(ValueError, match="7 heads"):
        HostPages(pages, HeadRange(0, 7))


def test_a_message_is_filled_in_place() -> None:
    message, content = new_message(5)
    content[:] = np.frombuffer(b"baton", dtype=np.uint8)
    assert message == b"baton"
    del content
    assert message == b"baton"
