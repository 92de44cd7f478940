"""The blocks of one KV pool: who uses them, which are free, and which hold content that a later prefix may hit.

Owns reference counts, the free queue and the key -> block map; knows nothing of tensors, tokens or sequences. `KVCache`
calls it, on the engine thread only. The design is that of vLLM's v1 block pool:

* A cached block that nobody references stays in the map *and* is in the free queue: it counts as free, and it is
  evicted only when it is handed out.
* Blocks freed without a key are reused first (last in, first out); those with a key are evicted least recently used
  first.
* Identical blocks are not merged when they fill, so block tables are append-only; a key may map to several blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from engine.kv.layout import NULL_BLOCK


class Block:
    """One block of the pool.

    Attributes:
        block_id: index into the pool tensor's second dimension.
        ref_count: block tables that hold it; not kept for the null block.
        key: `prefix_index.block_key` of its content while it is cached, else None.
        prev_free, next_free: neighbours in the free queue; None while in use.
    """

    __slots__ = ("block_id", "key", "next_free", "prev_free", "ref_count")

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.ref_count = 0
        self.key: bytes | None = None
        self.prev_free: Block | None = None
        self.next_free: Block | None = None

    @property
    def is_null(self) -> bool:
        """Whether it is the placeholder for ordinals that a window has passed."""
        return self.block_id == NULL_BLOCK

    def __repr__(self) -> str:
        key = self.key.hex()[:8] if self.key else None
        return f"Block({self.block_id}, ref_count={self.ref_count}, key={key})"


class FreeQueue:
    """Doubly-linked list of free blocks through the blocks themselves: every operation on one block is O(1).

    The fake head and tail spare all cases of a missing neighbour.
    """

    def __init__(self, blocks: Iterable[Block]) -> None:
        self._head = Block(-1)
        self._tail = Block(-1)
        self._head.next_free = self._tail
        self._tail.prev_free = self._head
        self._size = 0
        for block in blocks:
            self.append(block)

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Block]:
        """From the next to be handed out to the last."""
        block = self._head.next_free
        while block is not None and block is not self._tail:
            yield block
            block = block.next_free

    def append(self, block: Block) -> None:
        assert self._tail.prev_free is not None
        self._insert(self._tail.prev_free, block, self._tail)

    def prepend(self, block: Block) -> None:
        assert self._head.next_free is not None
        self._insert(self._head, block, self._head.next_free)

    def remove(self, block: Block) -> None:
        before, after = block.prev_free, block.next_free
        assert before is not None, f"{block} is not in the free queue"
        assert after is not None
        before.next_free = after
        after.prev_free = before
        block.prev_free = block.next_free = None
        self._size -= 1

    def pop(self) -> Block:
        """Removes and returns the block at the front."""
        block = self._head.next_free
        assert block is not None
        assert block is not self._tail, "the free queue is empty"
        self.remove(block)
        return block

    def check(self) -> None:
        """Raises AssertionError unless the links agree in both directions and the size is right."""
        count, before = 0, self._head
        for block in self:
            assert block.prev_free is before, f"{block} does not point back at {before}"
            count, before = count + 1, block
            assert count <= self._size, "the free queue is longer than its size"
        assert count == self._size
        assert self._tail.prev_free is before

    def _insert(self, before: Block, block: Block, after: Block) -> None:
        assert block.prev_free is None, f"{block} is already in the free queue"
        block.prev_free, block.next_free = before, after
        before.next_free = after.prev_free = block
        self._size += 1


class BlockPool:
    """Hands out, shares, caches and takes back blocks; block 0 is the null block and is never handed out.

    Attributes:
        num_blocks: all blocks, the null block included.
        enable_caching: False makes `register` do nothing, so that nothing is ever found.
        null_block: placeholder in block tables; `touch` and `free` pass over it.
    """

    def __init__(self, num_blocks: int, *, enable_caching: bool = True) -> None:
        assert num_blocks >= 2, "a pool holds the null block and at least one other"
        self.num_blocks = num_blocks
        self.enable_caching = enable_caching
        self._blocks = [Block(block_id) for block_id in range(num_blocks)]
        self.null_block = self._blocks[NULL_BLOCK]
        self._free = FreeQueue(block for block in self._blocks if not block.is_null)
        self._cached: dict[bytes, dict[int, Block]] = {}
        # Keys whose presence differs from what the last `take_events` left, and whether they are present now.
        self._changed: dict[bytes, bool] = {}

    @property
    def num_usable(self) -> int:
        """Blocks that can be handed out at all."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out now, cached ones without a reference included."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the usable blocks that is referenced, in [0, 1]."""
        return 1.0 - self.num_free / self.num_usable

    def allocate(self, n: int) -> list[Block]:
        """Takes `n` blocks from the front of the free queue, each with one reference; evicts those that were cached."""
        assert n <= self.num_free, f"{n} blocks asked for, {self.num_free} free"
        blocks = [self._free.pop() for _ in range(n)]
        for block in blocks:
            self._drop_key(block)
            block.ref_count = 1
        return blocks

    def touch(self, blocks: Iterable[Block]) -> None:
        """Adds one reference to each block; unreferenced ones leave the free queue."""
        for block in blocks:
            if block.is_null:
                continue
            if block.ref_count == 0:
                self._free.remove(block)
            block.ref_count += 1

    def free(self, blocks: Iterable[Block]) -> list[Block]:
        """Drops one reference from each block and returns those that became free.

        The order is that of eviction: what comes first is evicted first, so a sequence passes its tail first.
        """
        freed = []
        for block in blocks:
            if block.is_null:
                continue
            assert block.ref_count > 0, f"{block} is freed twice"
            block.ref_count -= 1
            if block.ref_count == 0:
                freed.append(block)
        for block in reversed([block for block in freed if block.key is None]):
            self._free.prepend(block)
        for block in freed:
            if block.key is not None:
                self._free.append(block)
        return freed

    def register(self, block: Block, key: bytes) -> None:
        """Makes a full, referenced block findable under `key`; a block keeps its first key."""
        assert not block.is_null
        assert block.ref_count > 0, f"{block} is registered while it is free"
        assert block.key is None or block.key == key, f"{block} is registered under another key"
        if not self.enable_caching or block.key is not None:
            return
        block.key = key
        if key not in self._cached:
            self._cached[key] = {}
            self._note_change(key, present=True)
        self._cached[key][block.block_id] = block

    def lookup(self, key: bytes) -> Block | None:
        """A block with this content: of several, the one registered first."""
        blocks = self._cached.get(key)
        return next(iter(blocks.values())) if blocks else None

    def evict(self, blocks: Iterable[Block]) -> None:
        """Drops the keys of blocks whose content proved wrong; references and places in the queue stay."""
        for block in blocks:
            self._drop_key(block)

    def take_events(self) -> tuple[list[bytes], list[bytes]]:
        """Keys (stored, removed) since the last call, net: what came and went, or went and came back, is in neither."""
        changed, self._changed = self._changed, {}
        stored = [key for key, present in changed.items() if present]
        removed = [key for key, present in changed.items() if not present]
        return stored, removed

    def cached_keys(self) -> list[bytes]:
        """All keys that can be found now: the snapshot that `take_events` continues from."""
        return list(self._cached)

    def blocks(self) -> Sequence[Block]:
        """All blocks by id, for inspection."""
        return self._blocks

    def check(self) -> None:
        """Raises AssertionError unless queue, references and map agree. O(num_blocks): for tests and idle moments."""
        self._free.check()
        unreferenced = {block.block_id for block in self._blocks if block.ref_count == 0 and not block.is_null}
        queued = [block.block_id for block in self._free]
        assert len(queued) == len(set(queued)), "a block is in the free queue twice"
        assert set(queued) == unreferenced, "the free queue and the reference counts disagree"
        assert all(block.ref_count >= 0 for block in self._blocks), "a reference count is negative"
        assert self.null_block.key is None, "the null block is cached"
        for key, same_content in self._cached.items():
            assert same_content, "the map keeps a key without blocks"
            for block_id, block in same_content.items():
                assert block is self._blocks[block_id]
                assert block.key == key, f"{block} is cached under another key"
        num_keyed = sum(block.key is not None for block in self._blocks)
        assert num_keyed == sum(map(len, self._cached.values())), "a block with a key is not in the map"

    def _drop_key(self, block: Block) -> None:
        key = block.key
        if key is None:
            return
        same_content = self._cached[key]
        del same_content[block.block_id]
        if not same_content:
            del self._cached[key]
            self._note_change(key, present=False)
        block.key = None

    def _note_change(self, key: bytes, *, present: bool) -> None:
        if self._changed.pop(key, None) is None:
            self._changed[key] = present
