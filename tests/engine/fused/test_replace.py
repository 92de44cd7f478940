"""What takes the place of a model's modules answers as they did; what would not is left alone."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from transformers import GraniteConfig, HeliumConfig, SmolLM3Config

from baton.config import ModelConfig
from engine.fused import cpu_kit, linear
from engine.fused.decoder_layer import FusedDecoderLayer
from engine.fused.linear import PanelLinear
from engine.fused.onednn_layer import OneDNNDecoderLayer
from engine.model_loader import load_model
from tests.engine.checkpoints import FAMILIES, make_checkpoint, save_checkpoint
from tests.engine.paged_model import PagedModel, transformers_logits, transformers_model

FUSED = {"llama", "mistral", "qwen2", "qwen3"}
PROMPTS = [[5, 9, 17, 23, 4, 8, 250, 11, 7], [30, 31, 32], [100]]
_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}


def layers_of(module: Any) -> Any:
    return module.get_decoder().layers


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_the_llama_shape_are_fused_and_all_others_packed(family: str, tmp_path: pathlib.Path) -> None:
    loaded = load_model(ModelConfig(path=str(make_checkpoint(family, tmp_path / family))))
    assert not loaded.prunes_rows
    fused = loaded.fuse("cpu")
    assert fused.prunes_rows == (family in FUSED)
    assert all(isinstance(layer, FusedDecoderLayer) for layer in layers_of(fused.module)) == (family in FUSED)
    assert isinstance(fused.module.lm_head, PanelLinear)
    assert not any(type(module) is torch.nn.Linear for module in fused.module.modules())


@pytest.mark.parametrize(
    "config",
    [
        # Multiplies what it adds to the residual.
        GraniteConfig(**_SIZES, residual_multiplier=0.5),
        # Rotates neighbours, not halves.
        HeliumConfig(**_SIZES),
    ],
    ids=lambda config: config.model_type,
)
def test_a_layer_that_only_looks_like_llamas_keeps_its_own_code(config: Any, tmp_path: pathlib.Path) -> None:
    path = save_checkpoint(config, tmp_path / "model")
    fused = load_model(ModelConfig(path=str(path))).fuse("cpu")
    assert not fused.prunes_rows
    assert not any(isinstance(layer, FusedDecoderLayer) for layer in layers_of(fused.module))
    ids = [[token % 64 for token in prompt] for prompt in PROMPTS]
    actual = PagedModel(path, "cpu", 16).logits(ids, [4, 3, 1])
    for rows, wanted in zip(actual, transformers_logits(transformers_model(path), ids), strict=True):
        assert (rows - wanted).abs().max() <= 1e-5


def test_each_kind_of_layer_is_proved_by_itself(tmp_path: pathlib.Path) -> None:
    """Every other layer does not rotate."""
    config = SmolLM3Config(**_SIZES | {"num_hidden_layers": 4}, no_rope_layers=[1, 0, 1, 0])
    path = save_checkpoint(config, tmp_path / "model")
    paged = PagedModel(path, "cpu", 16)
    assert [isinstance(layer, FusedDecoderLayer) for layer in layers_of(paged.model.module)] == [True, False] * 2
    assert not paged.model.prunes_rows
    assert not paged.model.attends
    ids = [[token % 64 for token in prompt] for prompt in PROMPTS]
    expected = transformers_logits(transformers_model(path), ids)
    for rows, wanted in zip(paged.logits(ids, [4, 3, 1]), expected, strict=True):
        assert (rows - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize("family", sorted(FUSED))
@pytest.mark.parametrize("bias", [False, True])
def test_biases_are_added_once(family: str, bias: bool, tmp_path: pathlib.Path) -> None:
    biases = {"attention_bias": bias} | ({"mlp_bias": bias} if family == "llama" else {})
    path = make_checkpoint(family, tmp_path / "model", **biases)
    paged = PagedModel(path, "cpu", 16)
    assert paged.model.prunes_rows
    for rows, wanted in zip(
        paged.logits(PROMPTS, [4, 3, 1]), transformers_logits(transformers_model(path), PROMPTS), strict=True
    ):
        assert (rows - wanted).abs().max() <= 1e-5


def test_a_sequence_comes_out_the_same_to_the_bit_whatever_is_computed_beside_it(tmp_path: pathlib.Path) -> None:
    path = make_checkpoint("qwen3", tmp_path / "model")
    beside = [[(7 * position + offset) % 250 for position in range(9 + 11 * offset)] for offset in range(14)]
    (alone,) = PagedModel(path, "cpu", 16).logits(PROMPTS[:1], [4])
    for count in (1, 5, 14):
        together = PagedModel(path, "cpu", 16).logits([*beside[:count], PROMPTS[0]], [*[3] * count, 4])
        assert torch.equal(together[-1], alone)


def test_layers_of_onednns_products_answer_as_the_originals(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, which every CPU has, though they are made for bfloat16."""
    for module in (cpu_kit, linear):
        monkeypatch.setattr(module, "has_kernels", lambda dtype: False)
    path = make_checkpoint("qwen3", tmp_path / "model")
    paged = PagedModel(path, "cpu", 16)
    assert all(isinstance(layer, OneDNNDecoderLayer) for layer in layers_of(paged.model.module))
    for rows, wanted in zip(
        paged.logits(PROMPTS, [4, 3, 1]), transformers_logits(transformers_model(path), PROMPTS), strict=True
    ):
        assert (rows - wanted).abs().max() <= 1e-5


def test_bfloat16_is_left_alone_where_the_cpu_has_none(tmp_path: pathlib.Path) -> None:
    path = make_checkpoint("llama", tmp_path / "model", dtype="bfloat16")
    fused = load_model(ModelConfig(path=str(path), dtype="bfloat16")).fuse("cpu")
    assert fused.prunes_rows == bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
