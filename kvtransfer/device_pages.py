"""A KV pool on a GPU as bytes: pages are gathered and scattered there, and pass to and from the host in one piece.

Copies run on streams of their own, beside the engine's. A copy begins when it is asked for: `mark` is to tell that the
pages are computed by then. It has ended when the call returns, so that whoever frees blocks needs no event of it.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from kvtransfer.device import Device, Mark
from kvtransfer.pages import BlockIds, Bytes, HeadRange, copy_with_checksum

# Copies that may be under way, each with buffers of its own; more wait.
_NUM_LANES = 4
_NO_PAGES, _ONE_PAGE = np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64)
# Where parts of a buffer begin, so that the GPU moves the widest words.
_ALIGNMENT = 256


class DevicePages:
    """`PageMemory` in the memory of a GPU.

    Args:
        pool: [num_slots, num_blocks, K|V, kv head, token, dim] of any dtype, contiguous.
        heads: those that a page holds.

    Attributes:
        device: that the pool lies on.
        pages: the pool as uint8 [num_slots * num_blocks, K|V, kv head, bytes of a head's K].
    """

    def __init__(self, pool: torch.Tensor, heads: HeadRange, device: Device) -> None:
        if not pool.is_contiguous() or pool.ndim != 6 or pool.shape[3] != heads.count:
            raise ValueError(f"{tuple(pool.shape)} is not the shape of a contiguous pool of {heads.count} heads")
        self.device = device
        self.num_slots, self.num_blocks = pool.shape[:2]
        self.heads = heads
        self.page_bytes = pool[0, 0].nbytes
        self.head_bytes = self.page_bytes // heads.count
        self.pages = pool.view(torch.uint8).flatten(start_dim=4).flatten(end_dim=1)
        self._lanes: queue.LifoQueue[_Lane] = queue.LifoQueue()
        for _ in range(_NUM_LANES):
            self._lanes.put(_Lane(device))
        self._warm_up()

    def mark(self) -> Mark:
        return self.device.mark()

    def copy_in(self, slot: int, block_ids: BlockIds, heads: HeadRange, payload: Bytes) -> int:
        with self._lane() as lane:
            here, there, start = lane.stage([self.page_numbers(slot, block_ids)], payload.nbytes)
            # What is written is this copy, whatever becomes of the payload.
            checksum = copy_with_checksum(payload, here[start:].numpy())
            with lane.stream.work():
                there.copy_(here, non_blocking=True)
                numbers = there[: block_ids.nbytes].view(torch.int64)
                rows = there[start:].view(len(block_ids), 2, heads.count, -1)
                self.device.copy_pages(rows, None, heads_of(self.pages, self.heads, heads), numbers)
        return checksum

    def copy_out(self, slot: int, block_ids: BlockIds, heads: HeadRange, out: Bytes) -> int:
        with self._lane() as lane:
            here, there, start = lane.stage([self.page_numbers(slot, block_ids)], out.nbytes)
            with lane.stream.work():
                there[:start].copy_(here[:start], non_blocking=True)
                numbers = there[: block_ids.nbytes].view(torch.int64)
                rows = there[start:].view(len(block_ids), 2, heads.count, -1)
                self.device.copy_pages(heads_of(self.pages, self.heads, heads), numbers, rows, None)
                here[start:].copy_(there[start:], non_blocking=True)
            return copy_with_checksum(here[start:].numpy(), out)

    def copy_from(
        self, source: torch.Tensor, held: HeadRange, places: Sequence[tuple[BlockIds, BlockIds]], heads: HeadRange
    ) -> None:
        """Copies pages straight from where another pool lies.

        Args:
            source: like `pages`, where this device can read it; each page holds the heads `held`.
            places: runs of pages there and here, int64 [n] each.
            heads: what is copied of each.
        """
        num_pages = sum(len(ours) for _, ours in places)
        # Both lists begin at 16 bytes, since Triton compiles a kernel anew for pointers that do not.
        padding = [_NO_PAGES] if num_pages % 2 == 0 else [_ONE_PAGE]
        with self._lane() as lane:
            here, there, _ = lane.stage([*(theirs for theirs, _ in places), *padding, *(ours for _, ours in places)], 0)
            with lane.stream.work():
                there.copy_(here, non_blocking=True)
                numbers = there[: 8 * (2 * num_pages + num_pages % 2)].view(torch.int64)
                theirs, ours = numbers[:num_pages], numbers[-num_pages:]
                target = heads_of(self.pages, self.heads, heads)
                self.device.copy_pages(heads_of(source, held, heads), theirs, target, ours)

    def copy_to(self, target: torch.Tensor, numbers: BlockIds, heads: HeadRange) -> None:
        """Gathers these heads of pages into a payload on the device: uint8 [n], as `copy_out` has it."""
        with self._lane() as lane:
            here, there, _ = lane.stage([numbers], 0)
            with lane.stream.work():
                there.copy_(here, non_blocking=True)
                ours = there[: numbers.nbytes].view(torch.int64)
                rows = target.view(len(numbers), 2, heads.count, -1)
                self.device.copy_pages(heads_of(self.pages, self.heads, heads), ours, rows, None)

    def page_numbers(self, slot: int, block_ids: BlockIds) -> BlockIds:
        """Where the pages of these blocks are among `pages`."""
        return slot * self.num_blocks + block_ids

    def _warm_up(self) -> None:
        """Has the kernels compiled now, and not while the first request waits; nothing changes."""
        # Whoever has just made the pool may still be clearing it.
        self.mark().synchronize()
        first, page = np.zeros(1, dtype=np.int64), np.empty(self.page_bytes, dtype=np.uint8)
        self.copy_out(0, first, self.heads, page)
        # Payloads that came in messages cannot be written, and numba compiles a copy of their own for them.
        for payload in (page, np.frombuffer(page.tobytes(), dtype=np.uint8)):
            self.copy_in(0, first, self.heads, payload)
        self.copy_from(self.pages, self.heads, [(first, first)], self.heads)

    @contextlib.contextmanager
    def _lane(self) -> Iterator[_Lane]:
        lane = self._lanes.get()
        try:
            yield lane
        finally:
            self._lanes.put(lane)


class _Lane:
    """A stream, and a buffer on each side; used by one thread at a time."""

    def __init__(self, device: Device) -> None:
        self.stream = device.stream()
        self._device = device
        self._here, self._there = device.pinned(_ALIGNMENT), device.empty(_ALIGNMENT)

    def stage(self, numbers: Sequence[BlockIds], num_bytes: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Room for `num_bytes` behind `numbers`, which are put down on the host, one after the other.

        Returns:
            here, there: uint8, of the host and of the device.
            start: where the room begins in both.
        """
        numbers_bytes = sum(each.nbytes for each in numbers)
        start = -(-numbers_bytes // _ALIGNMENT) * _ALIGNMENT
        end = start + num_bytes
        if len(self._here) < end:
            capacity = 1 << (end - 1).bit_length()
            self._here, self._there = self._device.pinned(capacity), self._device.empty(capacity)
        np.concatenate(numbers, out=self._here[:numbers_bytes].numpy().view(np.int64))
        return self._here[:end], self._there[:end], start


def heads_of(pages: torch.Tensor, held: HeadRange, wanted: HeadRange) -> torch.Tensor:
    """A view of some heads of uint8 [num_pages, K|V, held.count, n]: [num_pages, K|V, wanted.count, n]."""
    first = wanted.first - held.first
    return pages[:, :, first : first + wanted.count]
