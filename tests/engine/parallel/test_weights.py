"""Each rank reads its part of a checkpoint, and what cannot be cut is refused by name."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, GPT2Config, LlamaConfig, Phi3Config, PreTrainedConfig

from engine.parallel.plan import plan_shards, shard_config
from engine.parallel.weights import read_shard
from tests.engine.checkpoints import VOCAB_SIZE, make_checkpoint

SIZES: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gpt_oss"])
def test_shards_are_the_checkpoint_cut_in_two(family: str, tmp_path: pathlib.Path) -> None:
    path = make_checkpoint(family, tmp_path, sharded=family == "qwen3")
    plan = plan_shards(AutoConfig.from_pretrained(path), 2)
    whole = {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    first, second = (
        read_shard(path, plan, rank=rank, size=2, vocab_size=VOCAB_SIZE, dtype=torch.float32) for rank in (0, 1)
    )
    assert set(first) == set(second) == set(whole)
    for name, tensor in whole.items():
        if first[name].shape == tensor.shape:
            # Norms, and what is added once: to the first rank's summand.
            assert torch.equal(first[name], tensor)
            assert torch.equal(second[name], tensor) or not second[name].any()
        else:
            (dimension,) = (d for d in range(tensor.dim()) if first[name].shape[d] != tensor.shape[d])
            assert torch.equal(torch.cat([first[name], second[name]], dim=dimension), tensor)
    num_cut = sum(tensor.numel() for name, tensor in first.items() if tensor.shape != whole[name].shape)
    assert num_cut > 0.45 * sum(tensor.numel() for tensor in whole.values())


def test_a_vocabulary_that_does_not_divide_is_filled_up_with_zeros(tmp_path: pathlib.Path) -> None:
    path = make_checkpoint("llama", tmp_path, vocab_size=383)
    config = AutoConfig.from_pretrained(path)
    plan = plan_shards(config, 2)
    assert shard_config(config, 2).vocab_size == 192
    head = load_file(path / "model.safetensors")["lm_head.weight"]
    parts = [
        read_shard(path, plan, rank=rank, size=2, vocab_size=383, dtype=torch.float32)["lm_head.weight"]
        for rank in (0, 1)
    ]
    assert torch.equal(torch.cat(parts), torch.cat([head, torch.zeros(1, head.shape[1])]))


@pytest.mark.parametrize(
    ("config", "size", "problem"),
    [
        (LlamaConfig(**SIZES), 4, "tensor_parallel_size: 4 does not divide the model's num_key_value_heads, 2"),
        (
            LlamaConfig(**{**SIZES, "num_key_value_heads": None}),
            8,
            "tensor_parallel_size: 8 does not divide the model's num_key_value_heads, 4",
        ),
        (
            LlamaConfig(**{**SIZES, "intermediate_size": 97}),
            2,
            "tensor_parallel_size: 2 does not divide the model's intermediate_size, 97",
        ),
        (GPT2Config(), 2, "tensor_parallel_size: gpt2 has no number for intermediate_size that could be divided"),
        (Phi3Config(**SIZES, pad_token_id=0), 2, "phi3's layers.*.self_attn.qkv_proj is cut"),
    ],
)
def test_what_cannot_be_cut_is_refused(config: PreTrainedConfig, size: int, problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        plan_shards(config, size)
