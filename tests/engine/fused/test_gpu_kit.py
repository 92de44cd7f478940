"""What takes the place of a model's modules on a GPU answers as they did: there, or in Triton's interpreter."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch

from baton.config import ModelConfig
from engine.attention.triton import TritonAttention
from engine.batch import BatchItem
from engine.fused.gpu_layer import GpuDecoderLayer
from engine.fused.gpu_linear import GpuLinear
from engine.fused.gpu_mlp import GpuMLP
from engine.fused.gpu_norm import GpuRMSNorm
from engine.model_loader import LoadedModel, load_model
from engine.parallel.modules import Summed
from tests.engine.checkpoints import FAMILIES, make_checkpoint
from tests.engine.fused.test_replace import FUSED, layers_of
from tests.engine.kernels.interpreter import DEVICE
from tests.engine.paged_model import PagedModel, transformers_logits, transformers_model

ONE_LAYER: dict[str, Any] = {"num_hidden_layers": 1, "num_key_value_heads": 1}
CHANGES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2},
    **{family: {"layer_types": ["sliding_attention"]} for family in ("gemma2", "gemma3", "gpt_oss")},
}


def load(path: pathlib.Path) -> LoadedModel:
    return load_model(ModelConfig(path=str(path), device="cuda" if DEVICE.type == "cuda" else "cpu"))


@pytest.fixture(autouse=True)
def _nothing_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        monkeypatch.setattr(TritonAttention, "prepare", lambda *_: None)


def batch_invariant(path: pathlib.Path, **model: Any) -> PagedModel:
    """With norms of heads."""
    return PagedModel(make_checkpoint("qwen3", path, **ONE_LAYER), "triton", 16, batch_invariant=True, **model)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_the_llama_shape_are_fused_and_of_others_norms_and_gated_mlps(
    family: str, tmp_path: pathlib.Path
) -> None:
    """A layer is replaced where it has proved equal."""
    path = make_checkpoint(family, tmp_path / "model", **ONE_LAYER | CHANGES.get(family, {}))
    model = load(path).fuse("triton")
    assert model.prunes_rows == (family in FUSED)
    assert not model.attends
    modules = list(model.module.modules())
    assert [type(layer) is GpuDecoderLayer for layer in layers_of(model.module)] == [family in FUSED]
    assert {type(module) for module in modules if type(module).__name__.endswith("RMSNorm")} == {GpuRMSNorm}
    assert any(type(module) is GpuMLP for module in modules) == (family != "gpt_oss")
    assert type(model.module.lm_head) is torch.nn.Linear


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
def test_no_more_than_one_layer_is_held_twice(tmp_path: pathlib.Path) -> None:
    path = make_checkpoint("llama", tmp_path / "model", hidden_size=1024, intermediate_size=4096, num_hidden_layers=8)
    model = load(path)
    layer_bytes = 3 * 1024 * 4096 * 4
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    assert model.fuse("triton").prunes_rows
    assert torch.cuda.max_memory_reserved() <= before + 2 * layer_bytes
    assert torch.cuda.memory_reserved() <= before + layer_bytes


class Doubled:
    """`RankGroup` of two ranks with the same summands."""

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.mul_(2)


def test_layers_of_ranks_are_fused_and_their_summands_added(tmp_path: pathlib.Path) -> None:
    path = make_checkpoint("llama", tmp_path / "model", **ONE_LAYER)
    model = load(path)
    (layer,) = layers_of(model.module)
    group: Any = Doubled()
    layer.self_attn.o_proj = Summed(layer.self_attn.o_proj, group)
    layer.mlp.down_proj = Summed(layer.mlp.down_proj, group)
    assert model.fuse("triton").prunes_rows


def test_answers_as_transformers_does(tmp_path: pathlib.Path) -> None:
    """A chunk beside a decode, whose last layer computes no more than two rows, then a decode."""
    invariant = batch_invariant(tmp_path / "model")
    assert type(invariant.model.module.lm_head) is GpuLinear
    ids = [[5, 9, 17, 23], [30]]
    first, second = transformers_logits(transformers_model(tmp_path / "model"), ids)
    tables = [invariant.new_tables(len(row)) for row in ids]
    out = invariant.runner.execute([BatchItem(ids[0][:3], 0, tables[0], 1), BatchItem(ids[1], 0, tables[1], 1)])
    assert (out.cpu() - torch.cat([first[2:3], second])).abs().max() <= 1e-5
    out = invariant.runner.execute([BatchItem(ids[0][3:], 3, tables[0], 1)])
    assert (out.cpu() - first[3:]).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", ["float32"] if DEVICE.type == "cpu" else ["float32", "bfloat16"])
def test_logits_do_not_depend_on_the_batch_in_batch_invariant_mode(dtype: str, tmp_path: pathlib.Path) -> None:
    """To the bit: alone and in company, in one chunk, in two, and token by token."""
    invariant = batch_invariant(tmp_path / "model", dtype=dtype)
    ids = [5, 9, 17]
    (alone,) = invariant.logits([ids], [3])
    for others, chunks in (([[30, 31]], [3, 2]), ([[1]], [2, 1]), ([], [1])):
        assert torch.equal(invariant.logits([ids, *others], chunks)[0], alone)


def test_what_depends_on_the_batch_is_refused_in_batch_invariant_mode(tmp_path: pathlib.Path) -> None:
    path = make_checkpoint("gpt_oss", tmp_path / "model", **ONE_LAYER | CHANGES["gpt_oss"])
    model = load(path)
    with pytest.raises(ValueError, match=r"^model\.batch_invariant: what GptOssExperts, .* depends on the batch"):
        model.fuse("triton", batch_invariant=True)
