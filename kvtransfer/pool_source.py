"""The receiver's end of payloads that stay in the sender's pool, on a GPU that this process's can read.

The sender promises that a page stays as it is while the word of its frame holds the frame's generation. So the receiver
copies first and looks at the word afterwards: whatever has changed meanwhile, the word has changed before.
"""

from __future__ import annotations

import dataclasses
import itertools
import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from baton.errors import BatonError, StaleAttemptError, TransferError
from baton.internal.v1 import transfer_pb2
from kvtransfer.arrival import Arrival
from kvtransfer.device_pages import DevicePages
from kvtransfer.frame import Frame
from kvtransfer.pages import BlockIds, HeadRange, PageMemory
from kvtransfer.ring import Ring, open_ring
from kvtransfer.sources import Storeless, end_of

# Behind the header of such a frame: its generation, and then the sender's block of each page.
GENERATION = struct.Struct("<Q")
BLOCK_ID = np.dtype("<u4")


class Generations:
    """A word for each frame that may be under way, in memory that sender and receiver share.

    Args:
        ring: zeros at first; the sender alone writes it.
    """

    def __init__(self, ring: Ring, num_words: int) -> None:
        words: npt.NDArray[np.uint64] = ring.view(0, num_words * 8).view(np.uint64)
        self._words = words

    def set(self, generation: int) -> None:
        """A frame of this generation, which is not 0, takes the word of the oldest."""
        self._words[generation % len(self._words)] = generation

    def take_back(self, generation: int) -> None:
        """Unless the word has another frame already."""
        if self.holds(generation):
            self._words[generation % len(self._words)] = 0

    def holds(self, generation: int) -> bool:
        """Whether the frame's pages are as they were when it was sent."""
        return bool(self._words[generation % len(self._words)] == generation)


@dataclasses.dataclass(frozen=True, slots=True)
class InPlace:
    """Where the pages of a frame lie: `numbers` among all pages of the sender's pool."""

    generation: int
    numbers: BlockIds


class PoolSource(Storeless):
    """
    Args:
        memory: the receiver's pool.

    Raises:
        OSError, ValueError: the sender's cannot be read from there.
    """

    transport = "cuda_ipc"
    # As much as a header can say.
    max_payload_bytes = (1 << 32) - 1
    in_place = True

    def __init__(self, hello: transfer_pb2.StreamHello, memory: PageMemory) -> None:
        if not isinstance(memory, DevicePages):
            raise ValueError("this worker's pool is not on a GPU")
        pool = hello.pool
        if (pool.num_slots, pool.head_bytes) != (memory.num_slots, memory.head_bytes):
            raise ValueError(
                f"a block has {pool.num_slots} pages with {pool.head_bytes} bytes for each head, "
                f"not {memory.num_slots} with {memory.head_bytes}"
            )
        if not pool.num_blocks or not pool.num_heads or not hello.ring_bytes // 8:
            raise ValueError("the pool has no heads or blocks, or its frames have no generations")
        self._generations = Generations(open_ring(hello.ring_name, hello.ring_bytes), hello.ring_bytes // 8)
        self._held = HeadRange(pool.first_head, pool.num_heads)
        self._num_slots, self._num_blocks = pool.num_slots, pool.num_blocks
        self._mapping = memory.device.open(pool.handle)
        num_pages, page_bytes = pool.num_slots * pool.num_blocks, pool.num_heads * pool.head_bytes
        if self._mapping.memory.nbytes != num_pages * page_bytes:
            self._mapping.close()
            raise ValueError(f"{num_pages} pages of {page_bytes} bytes do not lie in what was mapped")
        self._pages = self._mapping.memory.view(num_pages, 2, pool.num_heads, -1)

    def payload(self, frame: Frame, message: bytes, offset: int) -> tuple[InPlace, int]:
        start = end_of(frame, message, offset, GENERATION.size)
        end = end_of(frame, message, start, frame.num_blocks * BLOCK_ID.itemsize)
        (generation,) = GENERATION.unpack_from(message, offset)
        numbers = np.frombuffer(message, BLOCK_ID, count=frame.num_blocks, offset=start).astype(np.int64)
        if (
            frame.slot >= self._num_slots
            or numbers.max(initial=0) >= self._num_blocks
            or not self._held.holds(frame.heads)
        ):
            raise TransferError(f"frame {frame.seq} names pages or heads that its sender's pool does not have")
        numbers += frame.slot * self._num_blocks
        return InPlace(generation, numbers), end

    def copy_in(self, memory: PageMemory, arrivals: Sequence[Arrival[InPlace]]) -> list[BatonError | None]:
        assert isinstance(memory, DevicePages)
        for heads, alike in itertools.groupby(arrivals, key=lambda arrival: arrival.frame.heads):
            places = [
                (arrival.payload.numbers, memory.page_numbers(arrival.frame.slot, arrival.block_ids))
                for arrival in alike
            ]
            memory.copy_from(self._pages, self._held, places, heads)
        return [self._judge(arrival) for arrival in arrivals]

    def close(self) -> None:
        self._mapping.close()

    def _judge(self, arrival: Arrival[InPlace]) -> BatonError | None:
        if self._generations.holds(arrival.payload.generation):
            return None
        return StaleAttemptError(f"frame {arrival.frame.seq} was taken back by its sender")
