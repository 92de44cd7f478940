"""Every attention backend answers as dense softmax does, whatever the batch, and never looks where it must not."""

from __future__ import annotations

import dataclasses
import pathlib
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.attention import AttentionBackend, backends_of, make_backend, resolve_backend
from tests.engine.paged_batches import PagedBatch, Shape

CPU = torch.device("cpu")
# Largest absolute differences of outputs near one.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
MIXED = [(0, 1), (37, 1), (0, 50), (29, 7), (64, 33), (15, 1), (90, 2)]


@pytest.fixture(scope="module", params=sorted(backends_of(CPU)))
def backend(request: pytest.FixtureRequest) -> AttentionBackend:
    return make_backend(request.param, CPU)


def check(backend: AttentionBackend, batch: PagedBatch) -> None:
    actual, expected = batch.run(backend), batch.expected()
    assert actual.shape == expected.shape
    assert actual.dtype == batch.shape.dtype
    assert actual.isfinite().all()
    assert (actual.double() - expected).abs().max() <= TOLERANCES[batch.shape.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [8, 16, 32])
def test_mixes_prefills_and_decodes_of_any_length(
    backend: AttentionBackend, block_size: int, dtype: torch.dtype
) -> None:
    check(backend, PagedBatch(Shape(block_size=block_size, dtype=dtype), MIXED))


@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (4, 2), (6, 2), (8, 2), (5, 1)])
def test_groups_query_heads(backend: AttentionBackend, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    shape = Shape(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    check(backend, PagedBatch(shape, [(20, 1), (0, 9), (17, 21)]))


@pytest.mark.parametrize("window", [1, 5, 16, 33, 1000])
@pytest.mark.parametrize("block_size", [8, 16])
def test_sees_a_sliding_window_whose_passed_blocks_are_freed(
    backend: AttentionBackend, block_size: int, window: int
) -> None:
    batch = PagedBatch(Shape(block_size=block_size, window=window), MIXED)
    check(backend, batch)


def test_windows_pass_whole_tiles_of_a_long_context(backend: AttentionBackend) -> None:
    check(backend, PagedBatch(Shape(window=70), [(700, 1), (650, 90)]))


def test_long_contexts_take_several_passes(backend: AttentionBackend) -> None:
    check(backend, PagedBatch(Shape(num_heads=2, num_kv_heads=1, block_size=32), [(1300, 1), (1100, 3)]))


def test_long_chunks_take_several_work_items(backend: AttentionBackend) -> None:
    check(backend, PagedBatch(Shape(head_dim=32), [(10, 300)]))


@pytest.mark.parametrize("softcap", [2.0, 30.0])
def test_caps_logits(backend: AttentionBackend, softcap: float) -> None:
    check(backend, PagedBatch(Shape(softcap=softcap, window=12), MIXED))


def test_sinks_take_probability(backend: AttentionBackend) -> None:
    check(backend, PagedBatch(Shape(sinks=(0.5, -2.0, 3.0, 0.0)), MIXED))


def test_sinks_come_after_the_cap_and_beside_a_window(backend: AttentionBackend) -> None:
    check(backend, PagedBatch(Shape(sinks=(40.0, -2.0, 3.0, 0.0), softcap=5.0, window=9), MIXED))


def test_a_sink_of_minus_infinity_is_none(backend: AttentionBackend) -> None:
    plain = PagedBatch(Shape(), MIXED)
    none = PagedBatch(dataclasses.replace(plain.shape, sinks=(-torch.inf,) * 4), MIXED)
    assert torch.equal(plain.run(backend), none.run(backend))


def test_a_huge_sink_takes_everything(backend: AttentionBackend) -> None:
    batch = PagedBatch(Shape(sinks=(1e4,) * 4), MIXED)
    assert batch.run(backend).abs().max() < 1e-6


def test_large_logits_do_not_overflow(backend: AttentionBackend) -> None:
    batch = PagedBatch(Shape(), MIXED)
    for query in batch.query:
        query.mul_(300)
    assert (batch.run(backend).double() - batch.expected()).abs().max() < 1e-3


def test_tokens_do_not_depend_on_the_rest_of_the_batch(backend: AttentionBackend) -> None:
    """Bit for bit: a sequence's keys and values must not change with its company."""
    together = PagedBatch(Shape(), MIXED)
    out = together.run(backend)
    rows = together.context.cu_seqlens_q.tolist()
    for index in range(len(MIXED)):
        alone = _transplant(together, index)
        assert torch.equal(alone.run(backend), out[rows[index] : rows[index + 1]])


def _transplant(batch: PagedBatch, index: int) -> PagedBatch:
    """One sequence of a batch as a batch of its own."""
    alone = PagedBatch(batch.shape, [batch.sequences[index]])
    cached, _ = batch.sequences[index]
    for position in range(cached):
        block = int(alone.group.block_tables[0, position // batch.shape.block_size])
        offset = position % batch.shape.block_size
        alone.kv[0, block, 0, :, offset] = batch.key[index][position]
        alone.kv[0, block, 1, :, offset] = batch.value[index][position]
    alone.query, alone.key, alone.value = [batch.query[index]], [batch.key[index]], [batch.value[index]]
    return alone


def test_write_touches_only_the_slots_of_the_step(backend: AttentionBackend) -> None:
    batch = PagedBatch(Shape(num_kv_heads=2, block_size=8), [(0, 5), (11, 2)])
    before = batch.kv.clone()
    batch.run(backend)
    changed = ~torch.isclose(before, batch.kv, equal_nan=True).all(-1)[0]
    written = torch.zeros_like(changed)
    slots = batch.group.slot_mapping
    written[slots // 8, :, :, slots % 8] = True
    assert torch.equal(changed, written)


@st.composite
def batches(draw: st.DrawFn) -> PagedBatch:
    num_kv_heads = draw(st.integers(1, 3))
    num_heads = num_kv_heads * draw(st.integers(1, 5))
    shape = Shape(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.sampled_from([8, 16, 24, 32, 64])),
        block_size=draw(st.sampled_from([1, 8, 16, 32])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        window=draw(st.none() | st.integers(1, 80)),
        softcap=draw(st.none() | st.floats(1.0, 50.0)),
        sinks=draw(st.none() | st.tuples(*[st.floats(-5.0, 5.0)] * num_heads)),
    )
    sequences = draw(st.lists(st.tuples(st.integers(0, 90), st.integers(1, 60)), min_size=1, max_size=5))
    return PagedBatch(shape, sequences, draw(st.integers(0, 1000)))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(batch=batches())
def test_any_batch(backend: AttentionBackend, batch: PagedBatch) -> None:
    check(backend, batch)


def test_auto_is_the_fastest_backend_of_the_device() -> None:
    assert resolve_backend("auto", CPU) == "cpu"
    assert resolve_backend("auto", torch.device("cuda")) == "triton"
    assert resolve_backend("auto", torch.device("mps")) == "reference"
    assert resolve_backend("auto", torch.device("cuda"), head_dim=256) == "triton"
    assert resolve_backend("auto", torch.device("cuda"), head_dim=512) == "reference"


def test_unknown_and_unfit_backends_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown backend 'tritn'"):
        resolve_backend("tritn", CPU)
    with pytest.raises(ValueError, match="'cpu' cannot run on device cuda"):
        resolve_backend("cpu", torch.device("cuda"))
    with pytest.raises(ValueError, match="'triton' cannot run on device cpu"):
        resolve_backend("triton", CPU)
    with pytest.raises(ValueError, match="'triton' has kernels for heads of at most 256 dimensions, not 512"):
        resolve_backend("triton", torch.device("cuda"), head_dim=512)


_THREADED = """
import threading, torch
torch.set_num_threads(1)
from engine.attention import make_backend
from tests.engine.paged_batches import PagedBatch, Shape
batch = PagedBatch(Shape(), [(30, 1), (0, 300), (5, 40)])
expected = batch.expected()
batch.run(make_backend("cpu", torch.device("cpu")))
failures = [] if torch.get_num_threads() == 1 else ["numba's threads became torch's"]
torch.set_num_threads(2)
def serve():
    backend = make_backend("cpu", torch.device("cpu"))
    own = PagedBatch(Shape(), batch.sequences)
    for _ in range(5):
        if not (own.run(backend).double() - expected).abs().max() < 1e-5:
            failures.append("wrong")
threads = [threading.Thread(target=serve) for _ in range(2)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(failures)
"""


def test_two_engines_of_one_process_may_use_several_threads_each() -> None:
    """In a process of its own: numba's work queue, its layer where OpenMP is missing, would abort the process."""
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", _THREADED], cwd=root, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
