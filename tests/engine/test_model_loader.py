"""Checkpoints that fit load as they are; the others are refused by name."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch
import transformers

from baton.config import ModelConfig
from engine.kv.layout import KVGroup
from engine.model_loader import LoadedModel, load_model
from tests.engine.checkpoints import MAX_MODEL_LEN, VOCAB_SIZE, make_checkpoint
from tests.engine.paged_model import PagedModel, transformers_logits, transformers_model


def load(path: pathlib.Path, **fields: Any) -> LoadedModel:
    return load_model(ModelConfig(path=str(path), **fields))


def edit_config(path: pathlib.Path, **fields: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def write_checkpoint(path: pathlib.Path, config: transformers.PreTrainedConfig, auto_class: Any) -> pathlib.Path:
    auto_class.from_config(config).save_pretrained(path)
    return path


def test_loads_what_the_config_says(tmp_path: pathlib.Path) -> None:
    model = load(make_checkpoint("gemma3", tmp_path))
    assert (model.dtype, model.device.type) == (torch.float32, "cpu")
    assert (model.vocab_size, model.max_model_len) == (VOCAB_SIZE, MAX_MODEL_LEN)
    assert [layer.window for layer in model.layers] == [8, 8, 8, None]
    layout = model.layout(16)
    assert layout.groups == (KVGroup((3,)), KVGroup((0,), 8), KVGroup((1,), 8), KVGroup((2,), 8))
    assert (layout.num_kv_heads, layout.head_dim, layout.block_size) == (2, 16, 16)
    assert model.generation_config.eos_token_id == 2


@pytest.mark.parametrize(
    ("family", "softcap", "has_sinks"), [("llama", None, False), ("gemma2", 20.0, False), ("gpt_oss", None, True)]
)
def test_notes_what_layers_ask_of_attention(
    family: str, softcap: float | None, has_sinks: bool, tmp_path: pathlib.Path
) -> None:
    layers = load(make_checkpoint(family, tmp_path)).layers
    assert {(layer.num_heads, layer.softcap, layer.has_sinks) for layer in layers} == {(4, softcap, has_sinks)}


def test_qwen_windows_only_the_layers_above_the_full_ones(tmp_path: pathlib.Path) -> None:
    path = make_checkpoint("qwen2", tmp_path, use_sliding_window=True, sliding_window=10, max_window_layers=3)
    assert [layer.window for layer in load(path).layers] == [None, None, None, 10]


def test_loads_sharded_checkpoints(tmp_path: pathlib.Path) -> None:
    path = make_checkpoint("llama", tmp_path, sharded=True)
    assert len(list(path.glob("*.safetensors"))) > 1
    ids = [[5, 6, 7, 8]]
    expected = transformers_logits(transformers_model(path), ids)[0]
    assert (PagedModel(path, "cpu", 8).logits(ids, [4])[0] - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("stored", "wanted", "dtype"),
    [
        ("float16", "auto", torch.float32),
        ("bfloat16", "float32", torch.float32),
        ("float32", "bfloat16", torch.bfloat16),
    ],
)
def test_resolves_the_dtype(stored: str, wanted: str, dtype: torch.dtype, tmp_path: pathlib.Path) -> None:
    model = load(make_checkpoint("llama", tmp_path, dtype=stored), dtype=wanted)
    assert model.dtype == dtype == model.layout(8).dtype
    assert {parameter.dtype for parameter in model.module.parameters()} == {dtype}


@pytest.mark.parametrize(("has_bfloat16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bfloat16_where_the_processor_computes_in_it(
    has_bfloat16: bool, dtype: torch.dtype, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.model_loader._cpu_has_bfloat16", lambda: has_bfloat16)
    assert load(make_checkpoint("llama", tmp_path, dtype="bfloat16"), dtype="auto").dtype == dtype


def test_limits_the_length(tmp_path: pathlib.Path) -> None:
    make_checkpoint("llama", tmp_path)
    assert load(tmp_path, max_model_len=100).max_model_len == 100
    with pytest.raises(ValueError, match="exceeds the checkpoint's max_position_embeddings"):
        load(tmp_path, max_model_len=MAX_MODEL_LEN + 1)


def test_refuses_what_is_no_checkpoint(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="no such directory"):
        load(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"no config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="safetensors"):
        load(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="unreadable"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="names no model_type"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no_such_family"}')
    with pytest.raises(ValueError, match="transformers cannot read it"):
        load(tmp_path)


def test_refuses_missing_weights(tmp_path: pathlib.Path) -> None:
    make_checkpoint("llama", tmp_path)
    edit_config(tmp_path, num_hidden_layers=5)
    with pytest.raises(ValueError, match=r"lack 9 tensors, such as model\.layers\.4"):
        load(tmp_path)


def test_refuses_broken_weights(tmp_path: pathlib.Path) -> None:
    make_checkpoint("llama", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="transformers cannot load it"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization_config": {"quant_method": "mxfp4"}}, "unsupported quantization_config .*'mxfp4'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "RoPE of type 'dynamic'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architecture is LlamaForSequenceClassification"),
        ({"layer_types": ["full_attention", "chunked_attention"] * 2}, "layer 1 .*'chunked_attention'"),
    ],
)
def test_refuses_features_by_name(fields: dict[str, Any], message: str, tmp_path: pathlib.Path) -> None:
    make_checkpoint("llama", tmp_path)
    edit_config(tmp_path, **fields)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


_SMALL = {"hidden_size": 32, "vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64), "mamba: .*recurrent state"),
        (transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=64), "bloom: ALiBi"),
        (transformers.FalconConfig(**_SMALL, alibi=True), "falcon: ALiBi"),
        (transformers.FalconConfig(**_SMALL), "AttentionInterface"),
        (transformers.BertConfig(**_SMALL, intermediate_size=32, is_decoder=False), "layer 0: attention is not causal"),
    ],
)
def test_refuses_other_decoders_by_name(
    config: transformers.PreTrainedConfig, message: str, tmp_path: pathlib.Path
) -> None:
    write_checkpoint(tmp_path, config, transformers.AutoModelForCausalLM)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_refuses_encoder_decoders(tmp_path: pathlib.Path) -> None:
    config = transformers.T5Config(d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, vocab_size=64)
    write_checkpoint(tmp_path, config, transformers.AutoModelForSeq2SeqLM)
    with pytest.raises(ValueError, match=r"t5: .*encoder-decoder"):
        load(tmp_path)


def test_refuses_encoders(tmp_path: pathlib.Path) -> None:
    config = transformers.BertConfig(**_SMALL, intermediate_size=32)
    write_checkpoint(tmp_path, config, transformers.AutoModelForMaskedLM)
    with pytest.raises(ValueError, match=r"bert: .*its architecture is BertForMaskedLM"):
        load(tmp_path)
