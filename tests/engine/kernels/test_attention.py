"""Attention kernels answer as dense softmax does, whatever the batch, and never look where they must not.

On a GPU where there is one, else in Triton's interpreter.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels.attention.launch import Batch, attend, launch
from engine.kernels.attention.plan import Plan
from engine.kernels.gpu import gpu_of
from engine.kernels.tiles import AttentionTile
from tests.engine.kernels.interpreter import DEVICE
from tests.engine.paged_batches import PagedBatch, Shape

# Largest absolute differences of outputs near one.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
SMALL = Shape(num_heads=4, num_kv_heads=2, head_dim=16, block_size=8)
TILE = AttentionTile(rows=16, keys=16, num_warps=4, num_stages=2)


class Call:
    """A batch of `tests.engine.paged_batches`, its new keys and values written already, as arguments of the kernels."""

    def __init__(self, shape: Shape, sequences: list[tuple[int, int]], seed: int = 0) -> None:
        self.paged = PagedBatch(shape, sequences, seed)
        self.shape = shape
        write_tokens(self.paged)
        context = self.paged.context
        self.query = self.paged._new(self.paged.query).to(DEVICE)
        self.pages = self.paged.kv[0].to(DEVICE)
        self.batch = Batch(
            block_tables=self.paged.group.block_tables.to(DEVICE),
            cu_seqlens_q=context.cu_seqlens_q.to(DEVICE),
            seq_lens=context.seq_lens.to(DEVICE),
            max_query_len=context.max_query_len,
            max_seq_len=context.max_seq_len,
        )

    @property
    def rule(self) -> dict[str, Any]:
        sinks = None if self.shape.sinks is None else torch.tensor(self.shape.sinks, device=DEVICE)
        shape = self.shape
        return {"scale": shape.scale, "window": shape.window, "softcap": shape.softcap, "sinks": sinks}

    def attend(self, **options: Any) -> torch.Tensor:
        return attend(self.query, self.pages, self.batch, **self.rule, **options).cpu()

    def launch(self, cut: Plan) -> torch.Tensor:
        return launch(self.query, self.pages, self.batch, cut, gpu_of(DEVICE), **self.rule).cpu()

    def cut(self, tile: AttentionTile = TILE, segments: int = 1) -> Plan:
        tokens, group = len(self.query), self.shape.num_heads // self.shape.num_kv_heads
        blocks = tokens // (tile.rows // group) + len(self.paged.sequences)
        return Plan(tile, blocks, segments, decode=False)


def write_tokens(paged: PagedBatch) -> None:
    """Store the new keys and values, without the kernels."""
    block_size = paged.shape.block_size
    slots = paged.group.slot_mapping
    for side, tensors in enumerate((paged.key, paged.value)):
        paged.kv[0][slots // block_size, side, :, slots % block_size] = paged._new(tensors)


def check(call: Call, actual: torch.Tensor) -> None:
    assert actual.dtype == call.shape.dtype
    assert actual.is_contiguous()
    assert actual.isfinite().all()
    assert (actual.double() - call.paged.expected()).abs().max() <= TOLERANCES[call.shape.dtype]


@st.composite
def calls(draw: st.DrawFn) -> Call:
    num_kv_heads = draw(st.integers(1, 2))
    num_heads = num_kv_heads * draw(st.integers(1, 5))
    shape = Shape(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.sampled_from([8, 16, 24])),
        block_size=draw(st.sampled_from([4, 16, 32, 256])),
        dtype=draw(st.sampled_from(list(TOLERANCES))),
        window=draw(st.none() | st.integers(1, 40)),
        softcap=draw(st.none() | st.floats(1.0, 50.0)),
        sinks=draw(st.none() | st.tuples(*[st.floats(-5.0, 5.0)] * num_heads)),
    )
    sequences = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), min_size=1, max_size=2))
    return Call(shape, sequences, draw(st.integers(0, 1000)))


@settings(max_examples=7, deadline=None, derandomize=True)
@given(call=calls(), segments=st.sampled_from([2, 4]))
def test_any_batch_in_one_pass_and_split(call: Call, segments: int) -> None:
    """Among more segments than some contexts have tiles, too."""
    check(call, call.attend())
    check(call, call.launch(call.cut(segments=segments)))


@pytest.mark.parametrize("max_seq_len", [1, 1 << 20])
def test_contexts_may_be_longer_or_shorter_than_was_planned_for(max_seq_len: int) -> None:
    call = Call(dataclasses.replace(SMALL, num_kv_heads=1), [(40, 1)])
    call.batch = dataclasses.replace(call.batch, max_seq_len=max_seq_len)
    check(call, call.attend())


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
def test_a_graph_is_right_for_longer_contexts_than_it_was_captured_with() -> None:
    call = Call(SMALL, [(900, 1), (3000, 1)])
    lengths = call.batch.seq_lens.clone()
    call.batch.seq_lens.fill_(20)
    call.batch = dataclasses.replace(call.batch, max_seq_len=4096)
    attend(call.query, call.pages, call.batch, **call.rule)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(call.query, call.pages, call.batch, **call.rule)
    call.batch.seq_lens.copy_(lengths)
    graph.replay()
    check(call, out.cpu())


def test_more_segments_than_are_merged_at_once() -> None:
    call = Call(dataclasses.replace(SMALL, num_kv_heads=1), [(40, 1)])
    check(call, call.launch(call.cut(segments=18)))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_sizes(head_dim: int) -> None:
    call = Call(dataclasses.replace(SMALL, head_dim=head_dim, num_kv_heads=1), [(20, 1), (0, 5)])
    check(call, call.attend())


def test_tiles_inside_a_block_are_copied_by_descriptors() -> None:
    """Blocks of two tiles; the pool is NaN beyond the sequences, and where their windows have passed."""
    shape = dataclasses.replace(SMALL, block_size=32, window=20, num_heads=2, num_kv_heads=1)
    call = Call(shape, [(40, 1), (33, 7)])
    copied = call.launch(call.cut(dataclasses.replace(TILE, descriptors=True)))
    check(call, copied)
    assert torch.equal(copied, call.launch(call.cut()))


def test_windows_pass_whole_tiles() -> None:
    call = Call(dataclasses.replace(SMALL, window=21), [(50, 1), (35, 9)])
    check(call, call.attend())
    check(call, call.launch(call.cut(segments=3)))


def test_sequences_without_queries_are_passed_over() -> None:
    """As in the last layer of a step, which computes wanted rows alone."""
    call = Call(SMALL, [(20, 1), (9, 6), (30, 1)])
    wanted = torch.tensor([0, 7], device=DEVICE)
    cu_seqlens_q = torch.tensor([0, 1, 1, 2], dtype=torch.int32, device=DEVICE)
    batch = dataclasses.replace(call.batch, cu_seqlens_q=cu_seqlens_q, max_query_len=1)
    some = attend(call.query[wanted].contiguous(), call.pages, batch, **call.rule)
    assert torch.equal(some.cpu(), call.attend()[wanted.cpu()])
    nothing = dataclasses.replace(call.batch, cu_seqlens_q=torch.zeros_like(cu_seqlens_q), max_query_len=0)
    assert attend(call.query[:0], call.pages, nothing, **call.rule).shape == (0, 4, 16)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("sinks", [None, (0.5,) * 4])
def test_padding_rows_without_context_are_zero(sinks: tuple[float, ...] | None) -> None:
    """As in decode steps that are padded to be replayed."""
    call = Call(dataclasses.replace(SMALL, sinks=sinks), [(20, 1), (9, 1)])
    seq_lens = torch.tensor([21, 0], dtype=torch.int32, device=DEVICE)
    whole = [call.launch(call.cut(segments=segments)) for segments in (1, 2)]
    call.batch = dataclasses.replace(call.batch, seq_lens=seq_lens)
    for segments, wanted in zip((1, 2), whole, strict=True):
        out = call.launch(call.cut(segments=segments))
        assert torch.equal(out[0], wanted[0])
        assert not out[1].any()


def test_no_tokens_have_no_output() -> None:
    call = Call(SMALL, [(3, 1)])
    none = Batch(call.batch.block_tables[:0], call.batch.cu_seqlens_q[:1], call.batch.seq_lens[:0], 0, 0)
    assert attend(call.query[:0], call.pages, none, scale=1.0).shape == (0, 4, 16)


def test_a_sink_of_minus_infinity_is_none() -> None:
    plain = Call(SMALL, [(20, 1)])
    none = Call(dataclasses.replace(SMALL, sinks=(-torch.inf,) * 4), [(20, 1)])
    for segments in (1, 2):
        assert torch.equal(*(call.launch(call.cut(segments=segments)) for call in (plain, none)))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_a_huge_sink_takes_everything() -> None:
    call = Call(dataclasses.replace(SMALL, sinks=(1e4,) * 4), [(20, 1)])
    for segments in (1, 2):
        assert call.launch(call.cut(segments=segments)).abs().max() < 1e-6


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_large_logits_do_not_overflow() -> None:
    call = Call(dataclasses.replace(SMALL, softcap=500.0), [(20, 1)])
    for query in call.paged.query:
        query.mul_(1e4)
    call.query.mul_(1e4)
    assert (call.attend().double() - call.paged.expected()).abs().max() < 1e-3


def test_outputs_do_not_depend_on_the_batch_in_batch_invariant_mode() -> None:
    """Bit for bit, alone and in company, as the decode that it was and as part of a chunk that replays it."""
    sequences = [(37, 1), (0, 19)]
    shape = dataclasses.replace(SMALL, window=15)
    together = Call(shape, sequences)
    out = together.attend(batch_invariant=True)
    starts = together.batch.cu_seqlens_q.tolist()
    for index, sequence in enumerate(sequences):
        alone = dataclasses.replace(
            together.batch,
            block_tables=together.batch.block_tables[index : index + 1],
            cu_seqlens_q=torch.tensor([0, sequence[1]], dtype=torch.int32, device=DEVICE),
            seq_lens=together.batch.seq_lens[index : index + 1],
        )
        rows = slice(starts[index], starts[index + 1])
        own = attend(together.query[rows], together.pages, alone, **together.rule, batch_invariant=True)
        assert torch.equal(own.cpu(), out[rows])
    for position in (3, 18):
        decode = Batch(
            block_tables=together.batch.block_tables[1:2],
            cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32, device=DEVICE),
            seq_lens=torch.tensor([position + 1], dtype=torch.int32, device=DEVICE),
            max_query_len=1,
            max_seq_len=position + 1,
        )
        row = starts[1] + position
        own = attend(together.query[row : row + 1], together.pages, decode, **together.rule, batch_invariant=True)
        assert torch.equal(own.cpu(), out[row : row + 1])
