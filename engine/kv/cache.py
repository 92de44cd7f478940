"""The paged KV cache of one worker: the pool tensor, its blocks, and the block tables of sequences.

Owns the tensor `kv` and the `BlockPool`. Only the engine thread calls it; a transfer thread may read and write pages of
`kv` in blocks that the engine holds for it, and nothing else.

A sequence's life: `match` what is cached, `begin`, `allocate` as it grows, `free_out_of_window` and `register` as
tokens are computed, `fork` for further choices, `free`. Sequences share full blocks only, and a full block is never
written again, so no write can reach a block that another sequence reads; the one partial block is copied when a
sequence forks.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch

from engine.kv.block_pool import Block, BlockPool
from engine.kv.huge_pages import advise_huge_pages
from engine.kv.layout import KVLayout
from engine.kv.prefix_index import PrefixHit, block_key, match_prefix
from engine.kv.sequence_blocks import SequenceBlocks

__all__ = ["KVCache", "PoolMirror", "SequenceBlocks"]


class PoolMirror(Protocol):
    """Pools that are to hold other KV heads of the same blocks: those of a worker's other ranks."""

    def copy_block(self, source: int, target: int) -> None:
        """Copy a block in all slots of the pool."""

    def spoil(self, block_ids: Sequence[int]) -> None:
        """Fill blocks with NaN."""


class KVCache:
    """One pool for all sequences of a worker.

    Args:
        mirror: does what is done here to blocks' content outside of the model.

    Attributes:
        kv: [num_slots, num_blocks, 2, num_kv_heads, block_size, head_dim], dtype of the layout.
        pool: its blocks; `pool.take_events` tells which content came and went.
        poison: fill blocks with NaN when they are freed without a key and when they are handed out, so that
            a read of anything that was not written since shows (float dtypes; for tests).
    """

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        *,
        enable_caching: bool = True,
        device: torch.device | str = "cpu",
        poison: bool = False,
        mirror: PoolMirror | None = None,
    ) -> None:
        self.layout = layout
        self.poison = poison
        self._mirror = mirror
        self.pool = BlockPool(num_blocks, enable_caching=enable_caching)
        self.kv = torch.zeros(layout.pool_shape(num_blocks), dtype=layout.dtype, device=device)
        if self.kv.device.type == "cpu":
            advise_huge_pages(self.kv)
        if poison:
            self.kv.fill_(torch.nan)

    @staticmethod
    def num_blocks_for(layout: KVLayout, num_bytes: int) -> int:
        """Blocks of a pool of at most `num_bytes`, the null block included; ValueError if none would be usable."""
        num_blocks = num_bytes // layout.block_bytes
        if num_blocks < 2:
            raise ValueError(f"kv_cache_bytes: {num_bytes} is less than two blocks of {layout.block_bytes} bytes")
        return num_blocks

    @property
    def num_free(self) -> int:
        return self.pool.num_free

    @property
    def usage(self) -> float:
        return self.pool.usage

    # Sizing: pure questions, used by admission.

    def blocks_needed(self, num_tokens: int, hit: PrefixHit | None = None, *, chunk_tokens: int | None) -> int:
        """Blocks that leave the free pool for a new sequence to hold `num_tokens` tokens.

        A group with full attention holds every block; one with a sliding window only those that something will still
        read. Hit blocks count while nobody references them, since using them takes them from the free pool.

        Args:
            hit: the cached prefix that the sequence begins with.
            chunk_tokens: None if all tokens arrive at once from elsewhere, and nothing but what the token after them
                sees is held (exact); else the most tokens computed in one step, so that a sliding window holds at
                most the keys before the step and the step's own (an upper bound over the sequence's life).
        """
        total = self.layout.num_blocks(num_tokens)
        num_hit = min(self.layout.num_blocks(hit.num_tokens), total) if hit else 0
        needed = 0
        for index, group in enumerate(self.layout.groups):
            first = group.first_visible(num_tokens) // self.layout.block_size if chunk_tokens is None else 0
            held_hits = hit.blocks[index][first:num_hit] if hit else ()
            unreferenced = sum(block.ref_count == 0 and not block.is_null for block in held_hits)
            in_group = total - max(first, num_hit) + unreferenced
            if group.window is not None and chunk_tokens is not None:
                in_group = min(in_group, self._window_blocks(group.window, num_tokens, chunk_tokens))
            needed += in_group
        return needed

    def blocks_to_come(self, seq: SequenceBlocks, num_tokens: int, *, chunk_tokens: int) -> int:
        """Blocks that `seq` will still take out of the free pool until it holds `num_tokens` tokens, at most.

        Net of what its sliding groups give back on the way: these need room for their window and one step of
        `chunk_tokens` tokens, less what they hold now.
        """
        total = self.layout.num_blocks(num_tokens)
        to_come = 0
        for index, group in enumerate(self.layout.groups):
            growth = max(0, total - len(seq.tables[index]))
            if group.window is not None:
                peak = min(total, self._window_blocks(group.window, num_tokens, chunk_tokens))
                growth = min(growth, max(0, peak - seq.num_held(index)))
            to_come += growth
        return to_come

    def fork_blocks_needed(self, num_tokens: int) -> int:
        """Blocks that a fork after `num_tokens` tokens takes: one copy in each group, none on a block boundary."""
        return len(self.layout.groups) if num_tokens % self.layout.block_size else 0

    def max_sequence_tokens(self, max_len: int, *, chunk_tokens: int = 1) -> int:
        """The most tokens, up to `max_len`, that one sequence can hold with the whole pool to itself.

        Args:
            chunk_tokens: the most tokens that it computes in one step.
        """
        return bisect.bisect_right(
            range(1, max_len + 1),
            self.pool.num_usable,
            key=lambda num_tokens: self.blocks_needed(num_tokens, chunk_tokens=chunk_tokens),
        )

    # A sequence's life.

    def match(self, block_hashes: Sequence[bytes], max_tokens: int) -> PrefixHit:
        """The longest cached prefix of at most `max_tokens` tokens; references nothing yet."""
        return match_prefix(self.pool, self.layout, block_hashes, max_tokens)

    def begin(self, hit: PrefixHit | None = None) -> SequenceBlocks:
        """A sequence that holds a hit's blocks, or none.

        All groups' blocks are referenced before anything else may allocate, else one group's allocation could evict
        what another group hit. Nothing may touch the cache between `match` and `begin`.
        """
        seq = SequenceBlocks(len(self.layout.groups))
        for group, blocks in enumerate(hit.blocks if hit else ()):
            assert all(block.is_null or block.key is not None for block in blocks), "the hit was evicted"
            self.pool.touch(blocks)
            seq.extend(group, blocks)
        seq.num_registered = seq.num_blocks
        return seq

    def allocate(self, seq: SequenceBlocks, num_tokens: int, *, surviving_from: int | None = None) -> bool:
        """Grows all tables to hold `num_tokens` tokens; False, with nothing allocated, if that does not fit.

        Args:
            surviving_from: position of the first query that will read these blocks (their content comes from another
                worker). Sliding groups then hold nothing that it does not see: null blocks instead, and blocks
                held there already are freed first, whether or not the rest fits.
        """
        assert not seq.freed
        if surviving_from is not None:
            self.free_out_of_window(seq, surviving_from)
        total = self.layout.num_blocks(num_tokens)
        num_null: list[int] = []
        num_new: list[int] = []
        for group, table in zip(self.layout.groups, seq.tables, strict=True):
            skipped = group.first_visible(surviving_from or 0) // self.layout.block_size
            start = min(max(len(table), skipped), max(len(table), total))
            num_null.append(start - len(table))
            num_new.append(max(0, total - start))
        if sum(num_new) > self.pool.num_free:
            return False
        blocks = iter(self._take(sum(num_new)))
        for index, (nulls, news) in enumerate(zip(num_null, num_new, strict=True)):
            seq.extend(index, [self.pool.null_block] * nulls + [next(blocks) for _ in range(news)])
        return True

    def free_out_of_window(self, seq: SequenceBlocks, num_computed: int) -> None:
        """Frees the blocks of sliding groups that no query from position `num_computed` on sees.

        Count only tokens whose step has ended, or that are computed on a GPU before whatever is launched from now on:
        a step under way still reads the window of its own first token.
        """
        assert not seq.freed
        for index, group in enumerate(self.layout.groups):
            if group.window is not None:
                first = group.first_visible(num_computed) // self.layout.block_size
                self._give_back(seq.cut_before(index, first, self.pool.null_block))

    def next_change(self, num_computed: int) -> int:
        """The next number of computed tokens, above `num_computed`, at which `register` or `free_out_of_window` can
        find anything to do."""
        size = self.layout.block_size
        changes = [(num_computed // size + 1) * size]
        for group in self.layout.groups:
            if group.window is not None:
                first = group.first_visible(num_computed) // size
                changes.append((first + 1) * size + group.window - 1)
        return min(changes)

    def register(self, seq: SequenceBlocks, block_hashes: Sequence[bytes], num_computed: int) -> None:
        """Makes the full blocks of the first `num_computed` tokens findable; their content must be complete and final.

        Args:
            block_hashes: of the sequence's full blocks from the first on; those beyond `num_computed` are ignored.
        """
        assert not seq.freed
        num_full = min(num_computed // self.layout.block_size, len(block_hashes))
        for ordinal in range(seq.num_registered, num_full):
            for group, table in enumerate(seq.tables):
                if not table[ordinal].is_null:
                    self.pool.register(table[ordinal], block_key(block_hashes[ordinal], group))
        seq.num_registered = max(seq.num_registered, num_full)

    def free(self, seq: SequenceBlocks) -> None:
        """Gives back all blocks, the tail first, so that a cached chain is evicted from its end. Idempotent."""
        if not seq.freed:
            self._give_back(seq.clear())

    # Forks: further choices of a request.

    def fork(self, seq: SequenceBlocks, num_tokens: int, tail: Sequence[Block] | None = None) -> SequenceBlocks | None:
        """A sequence with the same first `num_tokens` tokens, which `seq` has computed.

        It shares the full blocks and gets copies of the partial last one; None, with nothing done, if there is no block
        for these.

        Args:
            tail: blocks for the copies, from `reserve_tails` for as many tokens up to whole blocks; the fork owns them
                from here on. None takes them from the pool.
        """
        assert not seq.freed
        num_full, num_partial = divmod(num_tokens, self.layout.block_size)
        if tail is None:
            reserved = self.reserve_tails(1, num_tokens)
            if reserved is None:
                return None
            tail = reserved[0]
        assert len(tail) == self.fork_blocks_needed(num_tokens), "the tail was reserved for another number of tokens"
        child = SequenceBlocks(len(self.layout.groups))
        for group, table in enumerate(seq.tables):
            shared = table[:num_full]
            assert len(shared) == num_full
            self.pool.touch(shared)
            child.extend(group, shared)
            if num_partial:
                self.copy_block(table[num_full].block_id, tail[group].block_id)
                child.extend(group, [tail[group]])
        child.num_registered = min(seq.num_registered, num_full)
        return child

    def reserve_tails(self, num_forks: int, num_tokens: int) -> list[list[Block]] | None:
        """Blocks for the partial last blocks of later forks after `num_tokens` tokens, all or (None) nothing.

        Returns:
            For each fork one block for each group; empty lists where `num_tokens` is a multiple of the block size.
        """
        each = self.fork_blocks_needed(num_tokens)
        if num_forks * each > self.pool.num_free:
            return None
        return [self._take(each) for _ in range(num_forks)]

    def free_tails(self, tails: Iterable[Sequence[Block]]) -> None:
        """Gives back tails that no fork used."""
        for tail in tails:
            self._give_back(tail)

    # Content, beside what the model writes.

    def copy_block(self, source: int, target: int) -> None:
        """Copy a block in all slots."""
        if self._mirror is not None:
            self._mirror.copy_block(source, target)
        self.kv[:, target] = self.kv[:, source]

    def spoil(self, block_ids: Sequence[int]) -> None:
        """Fill blocks with NaN."""
        if self._mirror is not None:
            self._mirror.spoil(block_ids)
        self.kv[:, list(block_ids)] = torch.nan

    def _window_blocks(self, window: int, num_tokens: int, chunk_tokens: int) -> int:
        """Most blocks that a sliding group holds at a time: + 1, since a window need not begin on a block boundary."""
        return self.layout.num_blocks(min(window - 1 + chunk_tokens, num_tokens)) + 1

    def _take(self, n: int) -> list[Block]:
        blocks = self.pool.allocate(n)
        self._spoil(blocks)
        return blocks

    def _give_back(self, blocks: Iterable[Block]) -> None:
        freed = self.pool.free(blocks)
        self._spoil([block for block in freed if block.key is None])

    def _spoil(self, blocks: Sequence[Block]) -> None:
        if self.poison and blocks:
            self.spoil([block.block_id for block in blocks])
