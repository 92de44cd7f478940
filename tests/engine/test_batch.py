"""Items are flattened to the tensors that attention reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.batch import Batch, BatchItem, build_batch
from engine.kv.layout import KVGroup, KVLayout

LAYOUT = KVLayout((KVGroup((0,)), KVGroup((1,), 6)), 1, 4, 4, torch.float32)


def build(*items: BatchItem) -> Batch:
    return build_batch(items, LAYOUT)


def test_flattens_chunks_and_decodes() -> None:
    batch = build(
        BatchItem([10, 11, 12], 6, [[3, 5, 7], [0, 6, 8]], 2),
        BatchItem([13], 3, [np.array([9]), np.array([2])], 1),
        BatchItem([14, 15], 0, [[4, 1], [1, 4]]),
    )
    assert batch.token_ids.tolist() == [10, 11, 12, 13, 14, 15]
    assert batch.positions.tolist() == [6, 7, 8, 3, 0, 1]
    assert batch.cu_seqlens_q.tolist() == [0, 3, 4, 6]
    assert batch.seq_lens.tolist() == [9, 4, 2]
    assert batch.logit_rows.tolist() == [1, 2, 3]
    assert (batch.max_query_len, batch.max_seq_len) == (3, 9)
    full, sliding = batch.tables
    assert full.tolist() == [[3, 5, 7], [9, 0, 0], [4, 0, 0]]
    assert sliding.tolist() == [[0, 6, 8], [2, 0, 0], [1, 0, 0]]
    full_slots, sliding_slots = batch.slots
    assert full_slots.tolist() == [5 * 4 + 2, 5 * 4 + 3, 7 * 4, 9 * 4 + 3, 4 * 4, 4 * 4 + 1]
    assert sliding_slots.tolist() == [6 * 4 + 2, 6 * 4 + 3, 8 * 4, 2 * 4 + 3, 4, 5]


def test_has_the_types_that_kernels_expect() -> None:
    batch = build(BatchItem([1], 0, [[1], [2]])).on(torch.device("cpu"))
    assert batch.token_ids.dtype == batch.positions.dtype == batch.logit_rows.dtype == torch.int64
    assert batch.cu_seqlens_q.dtype == batch.seq_lens.dtype == torch.int32
    assert batch.groups[0].block_tables.dtype == torch.int32
    assert batch.groups[0].slot_mapping.dtype == torch.int64


def test_never_writes_to_the_null_block() -> None:
    with pytest.raises(AssertionError, match="null block"):
        build(BatchItem([1, 2], 3, [[1, 2], [0, 2]]))


def test_asks_for_logits_of_computed_tokens_only() -> None:
    with pytest.raises(AssertionError, match="logits"):
        build(BatchItem([1, 2], 0, [[1], [2]], 3))
