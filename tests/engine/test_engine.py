"""What an engine is made of, and what it refuses to be."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

from baton.config import CacheConfig, ModelConfig
from engine.engine import Engine, load_engine
from tests.engine.checkpoints import make_checkpoint

POOL = CacheConfig(kv_cache_bytes=1 << 20)


def load(path: pathlib.Path, **fields: Any) -> Engine:
    return load_engine(ModelConfig(path=str(path), device="cpu", max_model_len=64, **fields), POOL, chunk_tokens=8)


def test_on_a_cpu_fused_float32_layers_are_batch_invariant(tmp_path: pathlib.Path) -> None:
    engine = load(make_checkpoint("llama", tmp_path, num_hidden_layers=1), batch_invariant=True)
    assert engine.model.attends
    engine.grammars.close()


@pytest.mark.parametrize(
    ("family", "fields", "found"),
    [
        ("gemma2", {}, "'cpu' and gemma2 in float32"),
        ("llama", {"dtype": "bfloat16"}, "'cpu' and llama in bfloat16"),
        ("llama", {"attention": "reference"}, "'reference' and llama in float32"),
    ],
)
def test_what_would_depend_on_the_batch_is_refused(
    family: str, fields: dict[str, Any], found: str, tmp_path: pathlib.Path
) -> None:
    path = make_checkpoint(family, tmp_path)
    with pytest.raises(ValueError, match=rf"^model\.batch_invariant: on a GPU .* in float32, not {found}$"):
        load(path, batch_invariant=True, **fields)
