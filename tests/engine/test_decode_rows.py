"""Whatever joins, leaves, grows and pauses: picked rows equal a batch that is built from scratch."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from engine.batch import Batch, BatchItem, assemble, build_batch, parts_of
from engine.decode_rows import DecodeRows
from engine.kv.block_pool import Block
from engine.kv.cache import KVCache, SequenceBlocks
from engine.kv.layout import KVGroup, KVLayout

NUM_ROWS = 5
LAYOUTS = [
    KVLayout(groups, num_kv_heads=1, head_dim=1, block_size=4, dtype=torch.float32)
    for groups in (
        (KVGroup((0, 1)),),
        (KVGroup((0,), 6),),
        (KVGroup((0, 2)), KVGroup((1,), 6), KVGroup((3,), 1)),
    )
]
picks = st.integers(0, 63)
tokens = st.integers(0, 999)


@dataclasses.dataclass(eq=False)
class Decoding:
    """A sequence that computes its last token next."""

    token_ids: list[int]
    blocks: SequenceBlocks
    row: int

    @property
    def item(self) -> BatchItem:
        """What a step computes of it, as one that keeps nothing would say it."""
        return BatchItem(self.token_ids[-1:], len(self.token_ids) - 1, self.blocks.rows(), 1)


def assert_equal(actual: Batch, expected: Batch) -> None:
    for field in dataclasses.fields(Batch):
        one, other = getattr(actual, field.name), getattr(expected, field.name)
        for mine, theirs in zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]:
            assert np.array_equal(mine, theirs), field.name
            assert getattr(mine, "dtype", None) == getattr(theirs, "dtype", None), field.name


class AnyHistory(RuleBasedStateMachine):
    """Sequences of a small cache join, leave, fork and decode in any company."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[Decoding] = []

    @initialize(layout=st.sampled_from(LAYOUTS))
    def open(self, layout: KVLayout) -> None:
        self.layout = layout
        self.cache = KVCache(layout, 1200, enable_caching=False)
        self.rows = DecodeRows(layout, NUM_ROWS)

    @precondition(lambda self: len(self.running) < NUM_ROWS)
    @rule(length=st.one_of(st.integers(1, 12), st.sampled_from([63, 255, 257])), token=tokens)
    def join(self, length: int, token: int) -> None:
        blocks = self.cache.begin()
        assert self.cache.allocate(blocks, length)
        self.add([token] * length, blocks)

    @precondition(lambda self: 0 < len(self.running) < NUM_ROWS)
    @rule(pick=picks)
    def fork(self, pick: int) -> None:
        parent = self.running[pick % len(self.running)]
        num_computed = len(parent.token_ids) - 1
        blocks = self.cache.fork(parent.blocks, num_computed)
        assert blocks is not None
        assert self.cache.allocate(blocks, num_computed + 1)
        self.add(list(parent.token_ids), blocks)

    def add(self, token_ids: list[int], blocks: SequenceBlocks) -> None:
        start = len(token_ids) - 1
        self.cache.free_out_of_window(blocks, start)
        self.running.append(Decoding(token_ids, blocks, self.rows.add(token_ids[-1], start, blocks.rows())))

    @precondition(lambda self: self.running)
    @rule(pick=picks)
    def leave(self, pick: int) -> None:
        sequence = self.running.pop(pick % len(self.running))
        self.rows.remove(sequence.row)
        self.cache.free(sequence.blocks)
        assert len(self.rows) == len(self.running)

    @precondition(lambda self: self.running)
    @rule(mask=st.integers(1, 2**NUM_ROWS - 1), token=tokens, chunk=st.integers(0, 5), swap=st.booleans())
    def step(self, mask: int, token: int, chunk: int, swap: bool) -> None:
        """Some decode while others pause, in either order, perhaps beside a chunk of a prompt."""
        chosen = [sequence for index, sequence in enumerate(self.running) if mask >> index & 1] or self.running[:1]
        if swap:
            chosen.reverse()
        chunks = [BatchItem(list(range(chunk)), 2, [[7, 8]] * len(self.layout.groups), 1)] if chunk else []
        indices = np.array([sequence.row for sequence in chosen])
        parts = [self.rows.pick(indices)] + ([parts_of(chunks, self.layout)] if chunks else [])
        expected = build_batch([*(sequence.item for sequence in chosen), *chunks], self.layout)
        assert_equal(assemble(parts, self.layout), expected)
        number = self.rows.launched(indices)
        self.rows.tell(number, indices, [token + index for index in range(len(chosen))])
        for index, sequence in enumerate(chosen):
            self.go_on(sequence, token + index)

    def go_on(self, sequence: Decoding, token: int) -> None:
        """The next token is known; the blocks are looked after where `next_change` says that there is cause."""
        num_computed = len(sequence.token_ids)
        before = [list(table) for table in sequence.blocks.tables]
        changes = self.cache.next_change(num_computed - 1) <= num_computed
        self.cache.free_out_of_window(sequence.blocks, num_computed)
        assert changes or same(before, sequence.blocks.tables)
        sequence.token_ids.append(token)
        assert self.cache.allocate(sequence.blocks, num_computed + 1)
        if not same(before, sequence.blocks.tables):
            assert changes
            self.rows.set_tables(sequence.row, sequence.blocks.rows())


def same(tables: list[list[Block]], others: list[list[Block]]) -> bool:
    return all(list(one) == list(other) for one, other in zip(tables, others, strict=True))


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_free_rows_keep_what_they_had_and_nobody_sees_it() -> None:
    layout = LAYOUTS[0]
    rows = DecodeRows(layout, 2)
    long, short = rows.add(1, 11, [np.array([3, 4, 5], np.int32)]), rows.add(2, 0, [np.array([6], np.int32)])
    rows.remove(long)
    assert rows.pick(np.array([short])).tables[0].tolist() == [[6]]
    again = rows.add(9, 1, [np.array([8], np.int32)])
    assert again == long
    rows.tell(rows.launched(np.array([short])), np.array([short]), [7])
    parts = rows.pick(np.array([again, short]))
    assert parts.token_ids.tolist() == [9, 7]
    assert parts.starts.tolist() == [1, 1]
    assert [table.tolist() for table in parts.tables] == [[[8], [6]]]


def test_a_step_may_be_built_before_the_last_one_is_told() -> None:
    """Who joined meanwhile knows its token; the others' are found where the last step chooses them."""
    rows = DecodeRows(LAYOUTS[0], 4)
    table = [np.array([3, 4, 5], np.int32)]
    one, other, third = (rows.add(token_id, 4, table) for token_id in (10, 20, 30))
    first = np.array([other, third, one])
    assert rows.pick(first).sources is None
    first_number = rows.launched(first)
    late = rows.add(40, 7, table)
    second = np.array([one, late, other])
    parts = rows.pick(second)
    assert parts.sources is not None
    assert parts.sources.tolist() == [2, -1, 0]
    assert parts.starts.tolist() == [5, 7, 5]
    assert parts.token_ids[1] == 40
    second_number = rows.launched(second)
    rows.tell(first_number, first, [21, 31, 11])
    third_parts = rows.pick(np.array([one, third]))
    assert third_parts.sources is not None
    assert third_parts.sources.tolist() == [0, -1]
    assert third_parts.token_ids[1] == 31
    rows.tell(second_number, second, [12, 41, 22])
    last = rows.pick(np.array([one, other, third, late]))
    assert last.sources is None
    assert last.token_ids.tolist() == [12, 22, 31, 41]
    assert last.starts.tolist() == [6, 6, 5, 8]
