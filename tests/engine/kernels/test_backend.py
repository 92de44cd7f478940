"""The `triton` backend keeps the contract of `AttentionBackend`; `test_attention` has the kernels' own cases."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from engine.attention.base import AttentionContext, GroupMetadata
from engine.attention.triton import TritonAttention
from engine.dry_run import LayerAttention
from engine.kernels.attention import attend
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


def test_prepares_for_each_kind_of_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def record(query: torch.Tensor, pages: torch.Tensor, batch: Any, **rule: Any) -> torch.Tensor:
        calls.append((query.shape[1], rule["window"], rule["softcap"], rule["sinks"] is not None))
        return attend(query, pages, batch, **rule)

    monkeypatch.setattr("engine.attention.triton.attend", record)
    layout = KVLayout((KVGroup((0, 2), window=16), KVGroup((1,))), 1, 16, 64, torch.float32)
    windowed, capped = LayerAttention(2, 1, 16, 16, None, True), LayerAttention(2, 1, 16, None, 20.0, False)
    TritonAttention().prepare(layout, [windowed, capped, windowed])
    assert set(calls) == {(2, 16, None, True), (2, None, 20.0, False)}
    assert len(calls) == 2 * len({(queries, split) for queries in (1, 2, 32) for split in (False, True)})
