"""Prefill and decode composed in one process: outputs equal `transformers`, and pools are empty again."""

from __future__ import annotations

import pathlib

import pytest
import torch

from baton.config import DecodeConfig, PrefillConfig
from tests.composed import Pair
from tests.engine.checkpoints import EOS_ID, FAMILIES, VOCAB_SIZE, make_checkpoint


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: pathlib.Path(make_checkpoint(family, root / family)) for family in FAMILIES}


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1000 + length)
    return torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()


class Oracle:
    """`transformers`' own greedy generation, in float32."""

    def __init__(self, path: pathlib.Path) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")

    def generate(self, prompt: list[int], max_tokens: int) -> list[int]:
        ids = torch.tensor([prompt])
        out = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, use_cache=True
        )
        return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block_size", [8, 16, 32])
def test_greedy_tokens_equal_those_of_transformers(
    family: str, block_size: int, models: dict[str, pathlib.Path]
) -> None:
    oracle = Oracle(models[family])
    pair = Pair(
        models[family],
        block_size=block_size,
        prefill=PrefillConfig(max_batch_tokens=24),
        decode=DecodeConfig(prefill_chunk_tokens=7),
    )
    prompts = [prompt_of(length, seed) for seed, length in enumerate([1, block_size, 33, 50, 2 * block_size + 1])]
    specs = [
        pair.start(pair.spec(prompt, max_tokens=20, eos_token_ids=(EOS_ID,)), local_prefill=index % 3 == 2)
        for index, prompt in enumerate(prompts)
    ]
    pair.run()
    for prompt, spec in zip(prompts, specs, strict=True):
        assert pair.tokens(spec) == oracle.generate(prompt, 20)
    pair.assert_empty()
    pair.close()
