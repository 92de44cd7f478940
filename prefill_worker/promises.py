"""Blocks that admitted prompts are about to compute, so that nobody computes the same prefix beside them.

A prompt whose next uncached block is promised waits instead: once it is there, it is a hit. Used by the prefill loop on
the engine thread.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

from prefill_worker.scheduler import Prompt


class Promises:
    """Counts, for each block hash, the admitted prompts that will compute it."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._promised: collections.Counter[bytes] = collections.Counter()

    def __len__(self) -> int:
        return len(self._promised)

    def is_next_promised(self, block_hashes: Sequence[bytes], num_cached_tokens: int) -> bool:
        """Whether the block after a prompt's cached prefix is being computed for another."""
        next_block = num_cached_tokens // self._block_size
        return next_block < len(block_hashes) and block_hashes[next_block] in self._promised

    def make(self, prompt: Prompt, block_hashes: Sequence[bytes]) -> None:
        """`prompt` was admitted and will compute its remaining tokens."""
        self._promised.update(self._remaining(prompt, block_hashes, prompt.num_remaining))

    def settle(self, prompt: Prompt, block_hashes: Sequence[bytes], num_tokens: int) -> None:
        """The next `num_tokens` tokens of `prompt` are computed, or never will be. Call before it advances."""
        for block_hash in self._remaining(prompt, block_hashes, num_tokens):
            if self._promised[block_hash] == 1:
                del self._promised[block_hash]
            else:
                self._promised[block_hash] -= 1

    def _remaining(self, prompt: Prompt, block_hashes: Sequence[bytes], num_tokens: int) -> Sequence[bytes]:
        start = prompt.num_computed // self._block_size
        end = (prompt.num_computed + num_tokens) // self._block_size
        return block_hashes[start:end]
