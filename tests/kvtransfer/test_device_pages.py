"""A pool on a device moves the same bytes as one in host memory; by the kernels, interpreted where there is no GPU."""

from __future__ import annotations

import dataclasses
from concurrent import futures

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.cuda_ipc_memory import tensor_at
from kvtransfer.device_pages import DevicePages
from kvtransfer.pages import HeadRange, HostPages, PageMemory, pool_memory
from tests.engine.kernels.interpreter import DEVICE
from tests.kvtransfer.host_device import HostDevice, device_pages

HELD = HeadRange(4, 3)
SEED = 5


class InterpretedDevice(HostDevice):
    """With the kernels of GPUs."""

    def copy_pages(self, *arguments: torch.Tensor | None) -> None:
        # After the interpreter has taken hold of Triton.
        from engine.kernels.pages import copy_pages

        copy_pages(*arguments)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Case:
    """Pages of random bits, so with NaNs of every kind, and some of their heads."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    slot: int
    block_ids: np.ndarray
    heads: HeadRange

    def pools(self, seed: int = SEED) -> tuple[HostPages, DevicePages, torch.Tensor]:
        """Two of the same content, and the tensor of the second."""
        num_bytes = int(np.prod(self.shape)) * self.dtype.itemsize
        content = np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8)
        pool = torch.from_numpy(content.copy()).view(self.dtype).view(self.shape).to(DEVICE)
        host = HostPages(content.reshape(*self.shape[:2], -1), HELD)
        if DEVICE.type == "cuda":
            on_device = pool_memory(pool, HELD)
            assert isinstance(on_device, DevicePages)
        else:
            on_device = DevicePages(pool, HELD, InterpretedDevice())
        return host, on_device, pool

    @property
    def payload_bytes(self) -> int:
        num_elements = 2 * self.heads.count * self.shape[4] * self.shape[5]
        return len(self.block_ids) * num_elements * self.dtype.itemsize


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_slots, num_blocks = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    block_size, head_dim = draw(st.sampled_from([(1, 1), (1, 3), (8, 4), (16, 8), (16, 32)]))
    first = draw(st.integers(HELD.first, HELD.stop - 1))
    return Case(
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.uint8])),
        shape=(num_slots, num_blocks, 2, HELD.count, block_size, head_dim),
        slot=draw(st.integers(0, num_slots - 1)),
        block_ids=np.array(draw(st.lists(st.integers(0, num_blocks - 1), min_size=1, unique=True))),
        heads=HeadRange(first, draw(st.integers(1, HELD.stop - first))),
    )


def bytes_of(pool: torch.Tensor) -> np.ndarray:
    return pool.view(torch.uint8).cpu().flatten().numpy()


@settings(max_examples=10, deadline=None)
@given(cases())
def test_copies_are_those_of_host_memory(case: Case) -> None:
    host, on_device, pool = case.pools()
    memories: list[PageMemory] = [host, on_device]
    fields = ("num_slots", "num_blocks", "page_bytes", "heads", "head_bytes")
    assert [getattr(on_device, name) for name in fields] == [getattr(host, name) for name in fields]
    outs = [np.zeros(case.payload_bytes, dtype=np.uint8) for _ in range(2)]
    checksums = [
        memory.copy_out(case.slot, case.block_ids, case.heads, out) for memory, out in zip(memories, outs, strict=True)
    ]
    assert outs[0].tobytes() == outs[1].tobytes()
    assert checksums[0] == checksums[1]

    # What came in a message cannot be written.
    payload = np.frombuffer(np.random.default_rng(7).bytes(case.payload_bytes), dtype=np.uint8)
    expected = np.empty_like(payload)
    checksum = host.copy_in(case.slot, case.block_ids, case.heads, payload)
    assert on_device.copy_in(case.slot, case.block_ids, case.heads, payload) == checksum
    for slot in range(host.num_slots):
        whole = np.empty(host.num_blocks * host.page_bytes, dtype=np.uint8)
        host.copy_out(slot, np.arange(host.num_blocks), HELD, whole)
        np.testing.assert_array_equal(bytes_of(pool[slot]), whole)
    on_device.copy_out(case.slot, case.block_ids, case.heads, expected)
    assert expected.tobytes() == payload.tobytes()


@settings(max_examples=6, deadline=None)
@given(cases())
def test_pages_pass_from_pool_to_pool(case: Case) -> None:
    """The other pool holds one head more, before the same ones."""
    _, target, pool = case.pools()
    held = HeadRange(HELD.first - 1, HELD.count + 1)
    shape = (2, 8, 2, held.count, *case.shape[4:])
    content = np.random.default_rng(11).integers(0, 256, int(np.prod(shape)) * case.dtype.itemsize, dtype=np.uint8)
    source = torch.from_numpy(content).view(2 * 8, 2, held.count, -1)
    expected = target.pages.cpu().clone()
    numbers = target.page_numbers(case.slot, case.block_ids)
    source_numbers = np.random.default_rng(13).permutation(16)[: len(numbers)]
    theirs = slice(case.heads.first - held.first, case.heads.stop - held.first)
    ours = slice(case.heads.first - HELD.first, case.heads.stop - HELD.first)
    expected[numbers, :, ours] = source[source_numbers, :, theirs]
    half = len(numbers) // 2
    places = [(source_numbers[:half], numbers[:half]), (source_numbers[half:], numbers[half:])]
    target.copy_from(source.to(DEVICE), held, places, case.heads)
    np.testing.assert_array_equal(bytes_of(pool), expected.flatten().numpy())


def test_many_threads_copy_at_once() -> None:
    """More than have buffers at a time; each payload is of its own pages."""
    pages = np.random.default_rng(0).integers(0, 256, (2, 64, 3072), dtype=np.uint8)
    memory: PageMemory = device_pages(pages.copy(), HeadRange(0, 3), HostDevice())

    def move(first: int) -> None:
        for slot in (0, 1):
            out = np.empty(2 * 3072, dtype=np.uint8)
            memory.copy_out(slot, np.array([first, first + 1]), memory.heads, out)
            memory.copy_in(slot, np.array([first + 33, first + 32]), memory.heads, out)

    with futures.ThreadPoolExecutor(8) as threads:
        list(threads.map(move, range(0, 32, 2)))
    whole = np.empty(64 * 3072, dtype=np.uint8)
    memory.copy_out(1, np.arange(64), memory.heads, whole)
    expected = pages[1].copy()
    expected[32:] = pages[1, :32].reshape(16, 2, -1)[:, ::-1].reshape(32, -1)
    np.testing.assert_array_equal(whole.reshape(64, -1), expected)


def test_buffers_are_kept_from_one_copy_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    device = HostDevice()

    def pinned(num_bytes: int) -> torch.Tensor:
        made.append(num_bytes)
        return device.empty(num_bytes)

    monkeypatch.setattr(device, "pinned", pinned)
    memory = device_pages(np.zeros((1, 8, 1024), dtype=np.uint8), HeadRange(0, 1), device)
    made.clear()
    for num_pages in (3, 1, 2, 3):
        memory.copy_out(0, np.arange(num_pages), memory.heads, np.empty(num_pages * 1024, dtype=np.uint8))
    assert made == [4096]


def test_memory_at_an_address_passes_for_a_tensor() -> None:
    memory = torch.arange(16, dtype=torch.uint8, device=DEVICE)
    view = tensor_at(memory.data_ptr() + 4, 8, DEVICE)
    assert view.equal(memory[4:12])
    view[0] = 99
    assert memory[4] == 99


def test_a_tensor_that_is_no_pool_is_refused() -> None:
    pool = torch.zeros(2, 4, 2, 3, 8, 4)
    with pytest.raises(ValueError, match="contiguous pool of 2 heads"):
        DevicePages(pool, HeadRange(0, 2), HostDevice())
    with pytest.raises(ValueError, match="contiguous pool"):
        DevicePages(pool.transpose(0, 1), HeadRange(0, 3), HostDevice())
