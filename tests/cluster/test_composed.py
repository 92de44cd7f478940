"""Prefill and decode composed in one process: outputs equal `transformers`, and pools are empty again."""

from __future__ import annotations

import pathlib

import pytest

from baton.config import DecodeConfig, PrefillConfig
from tests.cluster.oracle import Oracle, prompt_of
from tests.composed import Pair
from tests.engine.checkpoints import EOS_ID, FAMILIES, make_checkpoint


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: make_checkpoint(family, root / family) for family in FAMILIES}


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
