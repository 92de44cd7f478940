"""A KV pool as bytes: what senders read and receivers write.

Any thread may call; who may touch which block when is the business of `Receiver` and `Push`. Both copies release the
GIL, so that the engine loop of the same process goes on, and take the checksum of what they write.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from engine.kv.layout import KVLayout
from kvtransfer.checked_copy import BLOCK_BYTES, LINE_BYTES, checked_copy
from kvtransfer.device import Mark

Bytes: TypeAlias = npt.NDArray[np.uint8]
BlockIds: TypeAlias = npt.NDArray[np.int64]

_ONE_PAGE = _FROM_ITS_START = np.zeros(1, dtype=np.int64)


@dataclasses.dataclass(frozen=True, slots=True)
class HeadRange:
    """KV heads [first, first + count), in the numbers of the whole model."""

    first: int
    count: int

    @property
    def stop(self) -> int:
        return self.first + self.count

    def holds(self, other: HeadRange) -> bool:
        """Whether `other` is a range of some of these heads."""
        return other.count > 0 and self.first <= other.first and other.stop <= self.stop

    def overlap(self, other: HeadRange) -> HeadRange:
        """The heads that are in both; of count 0 if there are none."""
        first = max(self.first, other.first)
        return HeadRange(first, max(0, min(self.stop, other.stop) - first))

    def __str__(self) -> str:
        return f"heads [{self.first}, {self.stop})"


class PageMemory(Protocol):
    """A view of the bytes of one rank's pool.

    A page is [K|V][kv head][token][dim], so a range of heads is two runs of its bytes. In a payload, uint8
    [len(block_ids) * heads.count * head_bytes], lie the same heads of several pages: [page][K|V][kv head][token][dim].

    Attributes:
        num_slots, num_blocks: pages of the pool.
        page_bytes: bytes of one page.
        heads: which heads the pages hold.
        head_bytes: bytes of one head, K and V, in a page.
    """

    num_slots: int
    num_blocks: int
    page_bytes: int
    heads: HeadRange
    head_bytes: int

    def copy_in(self, slot: int, block_ids: BlockIds, heads: HeadRange, payload: Bytes) -> int:
        """Writes `payload` into these heads of the pages of `block_ids`, in that order.

        Args:
            heads: a range that the pages hold; neither it nor the block ids are checked.

        Returns:
            xxh3_64 of the bytes that were written, whatever becomes of `payload` meanwhile.
        """

    def copy_out(self, slot: int, block_ids: BlockIds, heads: HeadRange, out: Bytes) -> int:
        """Reads these heads of the pages of `block_ids` into the payload `out`.

        Returns:
            xxh3_64 of the bytes that were read.
        """

    def mark(self) -> Mark | None:
        """What the calling thread has begun to do to the pool so far.

        To be waited for before what it writes is read, and before anything is written where it may still read or write.
        None where all is done when the call that does it returns.
        """


def check_memory(memory: PageMemory, layout: KVLayout) -> None:
    """Raises ValueError unless `memory` is that of a pool of `layout`."""
    ours = (memory.num_slots, memory.page_bytes, memory.heads.count)
    if ours != (layout.num_slots, layout.page_bytes, layout.num_kv_heads):
        raise ValueError("the pool's shape is not that of the layout")


def pool_memory(pool: torch.Tensor, heads: HeadRange | None = None) -> PageMemory:
    """The bytes of a pool tensor [num_slots, num_blocks, K|V, kv head, token, dim] of any dtype; shares its memory.

    Args:
        heads: those that the pool holds; all of the model's, unless given.
    """
    heads = heads or HeadRange(0, pool.shape[3])
    if pool.is_cuda:
        # Loads Triton, and CUDA's libraries.
        from kvtransfer.cuda_device import CudaDevice
        from kvtransfer.device_pages import DevicePages

        return DevicePages(pool, heads, CudaDevice(pool.device))
    return HostPages(pool.flatten(start_dim=2).view(torch.uint8).numpy(), heads)


def copy_with_checksum(source: Bytes, target: Bytes) -> int:
    """Copies uint8 [n] to as many; xxh3_64 of what was written."""
    if len(source) % BLOCK_BYTES == 0:
        return int(checked_copy(target, _ONE_PAGE, len(source), _FROM_ITS_START, len(source), source, True, False))
    target[:] = source
    return xxhash.xxh3_64_intdigest(target.data)


class _Runs(NamedTuple):
    """Where a range of heads lies in a page.

    Attributes:
        starts: int64 [num_runs], in order.
        num_bytes: length of each run.
        past_caches: whether it can be written past the caches.
    """

    starts: npt.NDArray[np.int64]
    num_bytes: int
    past_caches: bool


class HostPages:
    """`PageMemory` in the memory of this process.

    Args:
        pages: uint8 [num_slots, num_blocks, page_bytes], C-contiguous, writable on the receiving side.
        heads: those that a page holds.
    """

    def __init__(self, pages: Bytes, heads: HeadRange) -> None:
        if pages.dtype != np.uint8 or pages.ndim != 3 or not pages.flags.c_contiguous:
            raise ValueError("pages must be a C-contiguous uint8 array [num_slots, num_blocks, page_bytes]")
        if heads.count < 1 or pages.shape[2] % (2 * heads.count):
            raise ValueError(f"pages of {pages.shape[2]} bytes cannot hold K and V of {heads.count} heads")
        self.num_slots: int = pages.shape[0]
        self.num_blocks: int = pages.shape[1]
        self.page_bytes: int = pages.shape[2]
        self.heads = heads
        self.head_bytes = self.page_bytes // heads.count
        self._pages = pages
        self._flat = [slot_pages.reshape(-1) for slot_pages in pages]
        self._is_aligned = pages.ctypes.data % LINE_BYTES == 0
        # Of the few ranges that are asked for: a whole page is one run.
        self._runs = {heads: self._make_runs([0], self.page_bytes)}
        # Compiled now, and not while the first request waits; payloads that came in messages cannot be written.
        no_blocks = np.empty(0, dtype=np.int64)
        starts = self._runs[heads].starts
        for payload in (np.empty(0, dtype=np.uint8), np.frombuffer(b"", dtype=np.uint8)):
            checked_copy(self._flat[0], no_blocks, self.page_bytes, starts, BLOCK_BYTES, payload, False, False)

    def copy_in(self, slot: int, block_ids: BlockIds, heads: HeadRange, payload: Bytes) -> int:
        starts, num_bytes, past_caches = self._runs_of(heads)
        # The kernel takes whole blocks only, as all but toy models have them.
        if num_bytes % BLOCK_BYTES == 0:
            pages = self._flat[slot]
            return int(checked_copy(pages, block_ids, self.page_bytes, starts, num_bytes, payload, True, past_caches))
        rows = self._rows(slot, heads)
        rows[block_ids] = payload.reshape(len(block_ids), *rows.shape[1:])
        return xxhash.xxh3_64_intdigest(np.ascontiguousarray(rows[block_ids]).data)

    def copy_out(self, slot: int, block_ids: BlockIds, heads: HeadRange, out: Bytes) -> int:
        starts, num_bytes, _ = self._runs_of(heads)
        if num_bytes % BLOCK_BYTES == 0:
            pages = self._flat[slot]
            return int(checked_copy(pages, block_ids, self.page_bytes, starts, num_bytes, out, False, False))
        rows = self._rows(slot, heads)
        # Any other mode than clip makes numpy buffer `out`; the ids are checked where they come in.
        np.take(rows, block_ids, axis=0, out=out.reshape(len(block_ids), *rows.shape[1:]), mode="clip")
        return xxhash.xxh3_64_intdigest(out.data)

    def mark(self) -> None:
        return None

    def _runs_of(self, heads: HeadRange) -> _Runs:
        runs = self._runs.get(heads)
        if runs is None:
            first_key = (heads.first - self.heads.first) * self.head_bytes // 2
            starts = [first_key, self.page_bytes // 2 + first_key]
            runs = self._runs[heads] = self._make_runs(starts, heads.count * self.head_bytes // 2)
        return runs

    def _make_runs(self, starts: list[int], num_bytes: int) -> _Runs:
        past_caches = self._is_aligned and all(start % LINE_BYTES == 0 for start in (*starts, self.page_bytes))
        return _Runs(np.array(starts, dtype=np.int64), num_bytes, past_caches)

    def _rows(self, slot: int, heads: HeadRange) -> Bytes:
        """A view of these heads of a slot's pages: uint8 [num_blocks, K|V, heads.count, bytes of a head's K]."""
        rows: Bytes = self._pages[slot].reshape(self.num_blocks, 2, self.heads.count, -1)
        first = heads.first - self.heads.first
        return rows[:, :, first : first + heads.count]
