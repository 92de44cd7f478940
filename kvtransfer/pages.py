"""A KV pool as bytes: what senders read and receivers write.

Any thread may call; who may touch which block when is the business of `Receiver` and `Push`. All operations release
the GIL while they move bytes, so that the engine loop of the same process goes on.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import xxhash

Bytes: TypeAlias = npt.NDArray[np.uint8]
BlockIds: TypeAlias = npt.NDArray[np.int64]


class PageMemory:
    """A view of a pool's bytes.

    Args:
        pages: uint8 [num_slots, num_blocks, page_bytes], C-contiguous, writable on the receiving side.
    """

    def __init__(self, pages: Bytes) -> None:
        if pages.dtype != np.uint8 or pages.ndim != 3 or not pages.flags.c_contiguous:
            raise ValueError("pages must be a C-contiguous uint8 array [num_slots, num_blocks, page_bytes]")
        self.num_slots: int = pages.shape[0]
        self.num_blocks: int = pages.shape[1]
        self.page_bytes: int = pages.shape[2]
        self._pages = pages
        # Slices of a memoryview cost a third of an array's.
        self._flat = [memoryview(slot_pages.reshape(-1)) for slot_pages in pages]

    @classmethod
    def from_pool(cls, pool: torch.Tensor) -> PageMemory:
        """The bytes of a CPU pool tensor [num_slots, num_blocks, ...] of any dtype; shares its memory."""
        return cls(pool.flatten(start_dim=2).view(torch.uint8).numpy())

    def copy_in(self, slot: int, block_ids: BlockIds, payload: Bytes) -> None:
        """Writes `payload`, uint8 [len(block_ids) * page_bytes], into the pages of `block_ids` in that order."""
        rows = payload.reshape(len(block_ids), self.page_bytes)
        if (run := _single_run(block_ids)) is not None:
            np.copyto(self._pages[slot, run[0] : run[1]], rows)
        else:
            self._pages[slot][block_ids] = rows

    def copy_out(self, slot: int, block_ids: BlockIds, out: Bytes) -> None:
        """Reads the pages of `block_ids` into `out`, uint8 [len(block_ids) * page_bytes]."""
        rows = out.reshape(len(block_ids), self.page_bytes)
        if (run := _single_run(block_ids)) is not None:
            np.copyto(rows, self._pages[slot, run[0] : run[1]])
        else:
            # Any other mode than clip makes numpy buffer `out`; the ids are checked where they come in.
            np.take(self._pages[slot], block_ids, axis=0, out=rows, mode="clip")

    def views(self, slot: int, block_ids: BlockIds) -> list[memoryview]:
        """The bytes of `block_ids` where they lie, in that order, consecutive blocks as one."""
        flat, size = self._flat[slot], self.page_bytes
        return [flat[first * size : stop * size] for first, stop in _runs(block_ids)]

    def checksum(self, slot: int, block_ids: BlockIds) -> int:
        """xxh3_64 of the pages of `block_ids`, joined in that order."""
        if (run := _single_run(block_ids)) is not None:
            return xxhash.xxh3_64_intdigest(self._flat[slot][run[0] * self.page_bytes : run[1] * self.page_bytes])
        digest = xxhash.xxh3_64()
        for view in self.views(slot, block_ids):
            digest.update(view)
        return digest.intdigest()


def _single_run(block_ids: BlockIds) -> tuple[int, int] | None:
    """The blocks as [first, stop), if they are consecutive."""
    first, last = int(block_ids[0]), int(block_ids[-1])
    num_blocks = len(block_ids)
    # A run of one or two has no inside; most others that are none show it by their ends.
    if last - first != num_blocks - 1 or (num_blocks > 2 and not bool((block_ids[1:] - block_ids[:-1] == 1).all())):
        return None
    return first, last + 1


def _runs(block_ids: BlockIds) -> list[tuple[int, int]]:
    """Maximal runs [first, stop) of consecutive block ids, in order."""
    if (run := _single_run(block_ids)) is not None:
        return [run]
    breaks = (np.flatnonzero(block_ids[1:] - block_ids[:-1] != 1) + 1).tolist()
    ids = block_ids.tolist()
    return [(ids[start], ids[stop - 1] + 1) for start, stop in zip([0, *breaks], [*breaks, len(ids)], strict=True)]
