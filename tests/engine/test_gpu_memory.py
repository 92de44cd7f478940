"""The KV pool on a GPU is what a worker's share leaves beside its largest step."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable

import pytest
import torch

from baton.config import ModelConfig
from engine.attention import make_backend
from engine.gpu_memory import CudaMemory, MemoryUse, graph_bytes, largest_step, measured_pool_bytes, pool_bytes
from engine.kv.layout import KVGroup, KVLayout
from engine.model_loader import load_model
from tests.engine.checkpoints import make_checkpoint

GIB = 1 << 30
# A model of 16 GiB whose largest step takes 4, on a GPU of 80 of which others use 1.
USE = MemoryUse(total=80 * GIB, free=63 * GIB, held=16 * GIB, peak=20 * GIB)
LAYOUT = KVLayout((KVGroup((0,)), KVGroup((1,), window=8)), 2, 16, 8, torch.float32)


def test_the_pool_is_what_the_share_leaves() -> None:
    assert pool_bytes(USE, utilization=0.5, graphs=False, least=1) == 20 * GIB
    assert pool_bytes(USE, utilization=0.5, graphs=True, least=1) == 20 * GIB - graph_bytes(USE.total) == 19 * GIB


def test_the_pool_is_no_more_than_is_free_beside_the_step() -> None:
    assert pool_bytes(USE, utilization=1.0, graphs=False, least=1) == 59 * GIB
    assert pool_bytes(dataclasses.replace(USE, free=10 * GIB), utilization=0.9, graphs=False, least=1) == 6 * GIB


def test_small_gpus_keep_less_for_graphs() -> None:
    assert graph_bytes(8 * GIB) == GIB // 4


def test_where_nothing_is_left_it_says_what_takes_it() -> None:
    with pytest.raises(
        ValueError,
        match=r"^cache\.gpu_memory_utilization: 0\.25 of the GPU's 80\.00 GiB .* 20\.00 GiB, CUDA graphs 1\.00 GiB",
    ):
        pool_bytes(USE, utilization=0.25, graphs=True, least=1)
    crowded = dataclasses.replace(USE, free=3 * GIB)
    with pytest.raises(ValueError, match=r"^cache\.gpu_memory_utilization: .* only 3\.00 GiB are free, .* 61\.00 GiB$"):
        pool_bytes(crowded, utilization=0.9, graphs=False, least=1)
    with pytest.raises(ValueError, match="leaves nothing for KV"):
        pool_bytes(USE, utilization=0.26, graphs=False, least=GIB)


def test_the_largest_step_is_a_full_chunk_beside_all_decodes() -> None:
    items = largest_step(LAYOUT, chunk_tokens=50, decode_sequences=3, max_model_len=20)
    assert [len(item.token_ids) for item in items] == [1, 1, 1, 20, 20, 10]
    assert all(item.num_logits == len(item.token_ids) for item in items)
    assert items[-1].tables == [[1, 1]] * 2
    assert len(largest_step(LAYOUT, chunk_tokens=20, decode_sequences=0, max_model_len=20)) == 1


class StandIn:
    """`GpuMemory` of a GPU that is not there."""

    def measure(self, step: Callable[[], object]) -> MemoryUse:
        step()
        return USE


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_step_is_run_and_its_use_counted(family: str, tmp_path: pathlib.Path) -> None:
    model = load_model(ModelConfig(path=str(make_checkpoint(family, tmp_path)), device="cpu"))
    found = measured_pool_bytes(
        model,
        model.layout(16),
        make_backend("reference", model.device),
        utilization=0.5,
        chunk_tokens=40,
        decode_sequences=2,
        graphs=True,
        memory=StandIn(),
    )
    assert found == 19 * GIB


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_measures_what_a_step_takes() -> None:
    device = torch.device("cuda")
    kept = torch.empty(64 << 20, dtype=torch.uint8, device=device)
    use = CudaMemory(device).measure(lambda: torch.empty(256 << 20, dtype=torch.uint8, device=device))
    assert use.held >= kept.nbytes
    assert 256 << 20 <= use.peak - use.held <= 300 << 20
    assert 0 < use.free < use.total
