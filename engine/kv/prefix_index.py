"""Finds the longest cached prefix of a sequence in a pool.

Pure look-ups on the engine thread: nothing is referenced until `KVCache.begin`. The rules are vLLM's: a layer with full
attention needs every block of the prefix, one with a sliding window only the last blocks before the prefix's end, and
the length that counts is the longest that all groups agree on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from engine.kv.block_pool import Block, BlockPool
from engine.kv.layout import KVLayout


@dataclasses.dataclass(frozen=True, slots=True)
class PrefixHit:
    """A cached prefix.

    Attributes:
        num_tokens: its length, a multiple of the block size.
        blocks: one row for each group, one block for each ordinal of the prefix; the null block where a sliding
            window has passed. The blocks are not referenced: `KVCache.begin` must follow before anything is allocated.
    """

    num_tokens: int
    blocks: tuple[tuple[Block, ...], ...]


def block_key(block_hash: bytes, group: int) -> bytes:
    """The pool's key of a block: its content hash, then the group as 4 bytes big endian."""
    return block_hash + group.to_bytes(4, "big")


def match_prefix(pool: BlockPool, layout: KVLayout, block_hashes: Sequence[bytes], max_tokens: int) -> PrefixHit:
    """The longest cached prefix of at most `max_tokens` tokens (rounded down to blocks) that all groups can continue.

    Groups only ever shorten the candidate, so asking them in turn until none does reaches the fixed point; full
    attention needs asking once, since each of its shorter prefixes is a hit too.

    Args:
        block_hashes: chained hash of each full block of the sequence.
        max_tokens: for a prompt at most its length - 1, so that a token is left to compute logits from.
    """
    length = min(max_tokens // layout.block_size, len(block_hashes))
    full = {
        index: _leading_blocks(pool, block_hashes[:length], index)
        for index, group in enumerate(layout.groups)
        if group.window is None
    }
    length = min((len(row) for row in full.values()), default=length)
    windows = {
        index: layout.num_blocks(group.window - 1)
        for index, group in enumerate(layout.groups)
        if group.window is not None
    }
    sliding: dict[int, list[Block]] = {}
    candidate = None
    while candidate != length:
        candidate = length
        for index, num_needed in windows.items():
            sliding[index] = _trailing_blocks(pool, block_hashes[:length], index, num_needed)
            length = len(sliding[index])
    rows = (full[index][:length] if index in full else sliding[index] for index in range(len(layout.groups)))
    return PrefixHit(length * layout.block_size, tuple(map(tuple, rows)))


def _leading_blocks(pool: BlockPool, block_hashes: Sequence[bytes], group: int) -> list[Block]:
    """The cached blocks from the first up to the first miss."""
    blocks: list[Block] = []
    for block_hash in block_hashes:
        block = pool.lookup(block_key(block_hash, group))
        if block is None:
            break
        blocks.append(block)
    return blocks


def _trailing_blocks(pool: BlockPool, block_hashes: Sequence[bytes], group: int, num_needed: int) -> list[Block]:
    """The longest prefix whose last `num_needed` blocks (or all, if it is shorter) are cached; null before those."""
    end = len(block_hashes)
    run: list[Block] = []  # from its end to its start
    for ordinal in range(len(block_hashes) - 1, -1, -1):
        if len(run) == num_needed:
            break
        block = pool.lookup(block_key(block_hashes[ordinal], group))
        if block is None:
            end = ordinal
            run.clear()
        else:
            run.append(block)
    return [pool.null_block] * (end - len(run)) + run[::-1]
