"""The `triton` backend keeps the contract of `AttentionBackend`; `test_attention` has the kernels' own cases."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from engine.attention.base import AttentionContext, GroupMetadata
from engine.attention.triton import TritonAttention
from engine.kv.layout import KVGroup, KVLayout
from tests.engine.kernels.interpreter import DEVICE
from tests.engine.paged_batches import PagedBatch, Shape

SHAPE = Shape(num_heads=4, num_kv_heads=2, head_dim=16, block_size=8, window=11, sinks=(0.5, -2.0, 3.0, 0.0))
SEQUENCES = [(20, 1), (0, 5)]


def on_device(batch: PagedBatch) -> PagedBatch:
    """Move what a backend gets to where kernels run."""
    group = GroupMetadata(*(getattr(batch.group, each.name).to(DEVICE) for each in dataclasses.fields(GroupMetadata)))
    changes = {name: getattr(batch.context, name).to(DEVICE) for name in ("kv", "cu_seqlens_q", "seq_lens")}
    context: AttentionContext = dataclasses.replace(batch.context, groups=(group,), **changes)
    batch.kv, batch.group, batch.context = context.kv, group, context
    batch.query, batch.key, batch.value = (
        [each.to(DEVICE) for each in tensors] for tensors in (batch.query, batch.key, batch.value)
    )
    return batch


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_writes_and_attends(batch_invariant: bool) -> None:
    batch = PagedBatch(SHAPE, SEQUENCES)
    expected = batch.expected()
    out = on_device(batch).run(TritonAttention(batch_invariant=batch_invariant))
    assert (out.cpu().double() - expected).abs().max() <= 1e-5


def test_write_touches_only_the_slots_of_the_step() -> None:
    batch = on_device(PagedBatch(SHAPE, [(0, 5), (11, 2)]))
    before = batch.kv.clone()
    batch.run(TritonAttention())
    changed = ~torch.isclose(before, batch.kv, equal_nan=True).all(-1)[0]
    written = torch.zeros_like(changed)
    slots = batch.group.slot_mapping
    written[slots // 8, :, :, slots % 8] = True
    assert torch.equal(changed, written)


def test_queries_of_another_dtype_are_converted() -> None:
    batch = on_device(PagedBatch(SHAPE, SEQUENCES))
    expected = batch.run(TritonAttention())
    batch.query = [query.double() for query in batch.query]
    out = batch.run(TritonAttention())
    assert out.dtype == torch.float64
    assert torch.equal(out, expected.double())


def test_prepares_for_a_kind_of_layer() -> None:
    TritonAttention().prepare(KVLayout((KVGroup((0,), window=16),), 1, 16, 64, torch.float32))
