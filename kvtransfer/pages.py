"""A KV pool as bytes: what senders read and receivers write.

Any thread may call; who may touch which block when is the business of `Receiver` and `Push`. Both copies release the
GIL, so that the engine loop of the same process goes on, and take the checksum of what they write.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from kvtransfer.checked_copy import BLOCK_BYTES, LINE_BYTES, checked_copy

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
        self._flat = [slot_pages.reshape(-1) for slot_pages in pages]
        # The kernel takes whole blocks only, as all but toy models have them.
        self._copies_in_one_pass = self.page_bytes % BLOCK_BYTES == 0
        self._is_aligned = pages.ctypes.data % LINE_BYTES == 0
        # Compiled now, and not while the first request waits; payloads that came in messages cannot be written.
        no_blocks = np.empty(0, dtype=np.int64)
        for payload in (np.empty(0, dtype=np.uint8), np.frombuffer(b"", dtype=np.uint8)):
            checked_copy(self._flat[0], no_blocks, self.page_bytes, payload, False, False)

    @classmethod
    def from_pool(cls, pool: torch.Tensor) -> PageMemory:
        """The bytes of a CPU pool tensor [num_slots, num_blocks, ...] of any dtype; shares its memory."""
        return cls(pool.flatten(start_dim=2).view(torch.uint8).numpy())

    def copy_in(self, slot: int, block_ids: BlockIds, payload: Bytes) -> int:
        """Writes `payload`, uint8 [len(block_ids) * page_bytes], into the pages of `block_ids` in that order.

        Returns:
            xxh3_64 of the bytes that were written, whatever becomes of `payload` meanwhile.
        """
        rows = payload.reshape(len(block_ids), self.page_bytes)
        if self._copies_in_one_pass:
            return int(checked_copy(self._flat[slot], block_ids, self.page_bytes, payload, True, self._is_aligned))
        self._pages[slot][block_ids] = rows
        return xxhash.xxh3_64_intdigest(self._pages[slot][block_ids].data)

    def copy_out(self, slot: int, block_ids: BlockIds, out: Bytes) -> int:
        """Reads the pages of `block_ids` into `out`, uint8 [len(block_ids) * page_bytes].

        Returns:
            xxh3_64 of the bytes that were read.
        """
        rows = out.reshape(len(block_ids), self.page_bytes)
        if self._copies_in_one_pass:
            return int(checked_copy(self._flat[slot], block_ids, self.page_bytes, out, False, False))
        # Any other mode than clip makes numpy buffer `out`; the ids are checked where they come in.
        np.take(self._pages[slot], block_ids, axis=0, out=rows, mode="clip")
        return xxhash.xxh3_64_intdigest(out.data)
