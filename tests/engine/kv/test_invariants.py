"""Whatever the order of calls, no block is lost, shared wrongly, or changed under a reader.

A stateful test drives the cache as workers do: prompts that share prefixes begin with hits, are reserved for arrival
from elsewhere or computed in chunks, grow, lose their windows, fork (with and without reserved tails), and end. "KV" at
a position is a number that its whole prefix determines, so a stale, torn or foreign block shows as a wrong number, and
a poisoned one as NaN.
"""

import collections
import itertools

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baton.hashing import extend_chain, root_hash
from engine.kv.cache import KVCache
from engine.kv.layout import KVGroup, KVLayout
from engine.kv.prefix_index import block_key

BLOCK_SIZE = 4
NUM_BLOCKS = 30
LAYOUTS = [
    KVLayout(groups, num_kv_heads=1, head_dim=1, block_size=BLOCK_SIZE, dtype=torch.float32)
    for groups in (
        (KVGroup((0, 1)),),
        (KVGroup((0,), 6),),
        (KVGroup((0, 2)), KVGroup((1,), 6)),
        (KVGroup((0,)), KVGroup((1,), 9), KVGroup((2,), 1)),
    )
]
# Few different blocks, so that prompts often share prefixes.
prompts = st.builds(
    lambda blocks, rest: [*itertools.chain(*blocks), *rest],
    st.lists(st.sampled_from([(0,) * BLOCK_SIZE, (1,) * BLOCK_SIZE]), max_size=6),
    st.sampled_from([(0,), (1, 1), (0, 0, 0), (1,) * BLOCK_SIZE]),
)
picks = st.integers(0, 63)


class Choice:
    """A running sequence: its tokens so far, how many of them are computed, and its blocks."""

    def __init__(self, token_ids, seq, num_computed):
        self.token_ids = list(token_ids)
        self.seq = seq
        self.num_computed = num_computed

    @property
    def hashes(self):
        return extend_chain(root_hash("test"), self.token_ids, BLOCK_SIZE)


def prefix_numbers(token_ids):
    """For each position a number that its whole prefix determines."""
    numbers, number = [], 1
    for token_id in token_ids:
        number = (number * 31 + token_id + 7) % 65521
        numbers.append(number)
    return np.array(numbers, np.float32)


class CacheMachine(RuleBasedStateMachine):
    @initialize(layout=st.sampled_from(LAYOUTS))
    def start(self, layout):
        self.layout = layout
        self.cache = KVCache(layout, NUM_BLOCKS, poison=True)
        self.pool = self.cache.pool
        self.running = []
        self.reserved = []
        self.known_keys = set()
        self.content_of = {}

    # What a key, a page and a reference are to the test.

    def page(self, numbers, group, slot):
        """[2, block_size] KV of one layer for the positions of one block."""
        return numbers + np.float32(group / 16 + slot / 4) + np.array([[0.0], [0.125]], np.float32)

    def compute(self, choice, start, end):
        """Writes the KV of positions [start, end), as attention does, and notes what full blocks must hold."""
        numbers = prefix_numbers(choice.token_ids)
        kv = self.cache.kv.numpy()
        for index, group in enumerate(self.layout.groups):
            for position in range(start, end):
                block = choice.seq.tables[index][position // BLOCK_SIZE]
                if block.is_null:
                    continue
                assert block.ref_count == 1, "a shared block is written"
                assert block.key is None, "a cached block is written"
                for slot in range(len(group.layers)):
                    page = self.page(numbers[position : position + 1], index, slot)
                    kv[slot, block.block_id, :, 0, position % BLOCK_SIZE, 0] = page[:, 0]
            for ordinal, block_hash in enumerate(choice.hashes):
                block_numbers = numbers[ordinal * BLOCK_SIZE : (ordinal + 1) * BLOCK_SIZE]
                self.content_of[block_key(block_hash, index)] = [
                    self.page(block_numbers, index, slot) for slot in range(len(group.layers))
                ]

    def snapshot(self):
        blocks = [(block.ref_count, block.key) for block in self.pool.blocks()]
        return blocks, [[row.tolist() for row in choice.seq.rows()] for choice in self.running]

    def one_of_running(self, pick):
        return self.running[pick % len(self.running)]

    # What workers do.

    @rule(token_ids=prompts)
    def reserve_for_arrival(self, token_ids):
        choice = Choice(token_ids, None, 0)
        num_tokens = len(token_ids)
        hit = self.cache.match(choice.hashes, num_tokens - 1)
        needed = self.cache.blocks_needed(num_tokens, hit, chunk_tokens=None)
        free_before = self.cache.num_free
        choice.seq = self.cache.begin(hit)
        fits = self.cache.allocate(choice.seq, num_tokens, surviving_from=num_tokens)
        assert fits == (needed <= free_before)
        if not fits:
            self.cache.free(choice.seq)
            assert self.cache.num_free == free_before
            return
        assert free_before - self.cache.num_free == needed
        self.running.append(choice)
        self.compute(choice, hit.num_tokens, num_tokens)
        choice.num_computed = num_tokens
        self.cache.register(choice.seq, choice.hashes, num_tokens)

    @rule(token_ids=prompts)
    def begin_local(self, token_ids):
        choice = Choice(token_ids, None, 0)
        hit = self.cache.match(choice.hashes, len(token_ids) - 1)
        choice.seq, choice.num_computed = self.cache.begin(hit), hit.num_tokens
        self.running.append(choice)

    @precondition(lambda self: self.running)
    @rule(pick=picks, more=st.sampled_from([(0,), (1,), (0,) * BLOCK_SIZE, (1,) * 9]))
    def step(self, pick, more):
        choice = self.one_of_running(pick)
        start = choice.num_computed
        if start == len(choice.token_ids):
            choice.token_ids += more
        end = min(len(choice.token_ids), start + len(more))
        before = self.snapshot()
        if not self.cache.allocate(choice.seq, end):
            assert self.snapshot() == before
            return
        self.compute(choice, start, end)
        choice.num_computed = end
        self.cache.register(choice.seq, choice.hashes, end)
        self.cache.free_out_of_window(choice.seq, end)

    @precondition(lambda self: self.running)
    @rule(pick=picks)
    def fork(self, pick):
        choice = self.one_of_running(pick)
        before = self.snapshot()
        child = self.cache.fork(choice.seq, choice.num_computed)
        if child is None:
            assert self.cache.fork_blocks_needed(choice.num_computed) > self.cache.num_free
            assert self.snapshot() == before
        else:
            self.running.append(Choice(choice.token_ids[: choice.num_computed], child, choice.num_computed))

    @precondition(lambda self: self.running)
    @rule(pick=picks, count=st.integers(1, 3))
    def reserve_tails(self, pick, count):
        choice = self.one_of_running(pick)
        before = self.snapshot()
        tails = self.cache.reserve_tails(count, choice.num_computed)
        if tails is None:
            assert self.snapshot() == before
        else:
            self.reserved += [(choice, choice.num_computed, tail) for tail in tails]

    @precondition(lambda self: self.reserved)
    @rule(pick=picks)
    def use_tail(self, pick):
        choice, num_tokens, tail = self.reserved.pop(pick % len(self.reserved))
        if choice in self.running and choice.num_computed == num_tokens:
            child = self.cache.fork(choice.seq, num_tokens, tail)
            self.running.append(Choice(choice.token_ids[:num_tokens], child, num_tokens))
        else:
            self.cache.free_tails([tail])

    @precondition(lambda self: self.running)
    @rule(pick=picks)
    def end(self, pick):
        choice = self.one_of_running(pick)
        self.running.remove(choice)
        self.cache.free(choice.seq)
        before = self.snapshot()
        self.cache.free(choice.seq)
        assert self.snapshot() == before

    @precondition(lambda self: len(self.running) > 2)
    @rule()
    def end_all(self):
        while self.running:
            self.end(0)

    @precondition(lambda self: self.running)
    @rule(pick=picks)
    def drop_hashes(self, pick):
        self.pool.evict(block for table in self.one_of_running(pick).seq.tables for block in table)

    # What must always hold.

    @invariant()
    def the_pool_is_whole(self):
        self.pool.check()

    @invariant()
    def references_are_those_of_tables_and_tails(self):
        counts = collections.Counter(
            block.block_id for choice in self.running for table in choice.seq.tables for block in table
        )
        counts.update(block.block_id for _, _, tail in self.reserved for block in tail)
        del counts[0]
        assert counts == {block.block_id: block.ref_count for block in self.pool.blocks() if block.ref_count > 0}
        assert self.cache.num_free + len(counts) == NUM_BLOCKS - 1

    @invariant()
    def every_visible_position_reads_as_written(self):
        kv = self.cache.kv.numpy()
        for choice in self.running:
            numbers = prefix_numbers(choice.token_ids)
            for index, (group, row) in enumerate(zip(self.layout.groups, choice.seq.rows(), strict=True)):
                positions = np.arange(group.first_visible(choice.num_computed), choice.num_computed)
                blocks = row[positions // BLOCK_SIZE]
                assert (blocks != 0).all()
                for slot in range(len(group.layers)):
                    read = kv[slot, blocks, :, 0, positions % BLOCK_SIZE, 0].T
                    np.testing.assert_array_equal(read, self.page(numbers[positions], index, slot))

    @invariant()
    def cached_content_never_changes_and_uncached_free_blocks_are_poisoned(self):
        kv = self.cache.kv.numpy()
        for block in self.pool.blocks():
            if block.key is not None:
                for slot, page in enumerate(self.content_of[block.key]):
                    np.testing.assert_array_equal(kv[slot, block.block_id, :, 0, :, 0], page)
            elif block.ref_count == 0:
                assert np.isnan(kv[:, block.block_id]).all()

    @invariant()
    def rows_mirror_the_tables(self):
        for choice in self.running:
            for row, table in zip(choice.seq.rows(), choice.seq.tables, strict=True):
                assert row.tolist() == [block.block_id for block in table]

    @invariant()
    def events_keep_a_mirror_of_the_keys(self):
        stored, removed = self.pool.take_events()
        assert self.known_keys.isdisjoint(stored)
        assert self.known_keys.issuperset(removed)
        self.known_keys = (self.known_keys | set(stored)) - set(removed)
        assert self.known_keys == set(self.pool.cached_keys())

    def teardown(self):
        if not hasattr(self, "cache"):
            return
        for choice in self.running:
            self.cache.free(choice.seq)
        self.cache.free_tails(tail for _, _, tail in self.reserved)
        assert self.cache.num_free == NUM_BLOCKS - 1
        self.pool.check()


CacheMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestCacheMachine = CacheMachine.TestCase
