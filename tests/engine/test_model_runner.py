"""Every family computes over the paged cache what transformers computes without one."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine.attention import backends_of
from engine.batch import BatchItem
from tests.engine.checkpoints import FAMILIES, VOCAB_SIZE, make_checkpoint
from tests.engine.paged_model import PagedModel, transformers_greedy, transformers_logits, transformers_model

# Logits of the tiny checkpoints have a standard deviation of 0.3 to 0.4, so this is absolute.
TOLERANCE = 1e-5
LENGTHS = [45, 7, 1, 30]
BACKENDS = sorted(backends_of(torch.device("cpu")))

Checkpoints = Callable[[str], pathlib.Path]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    root = tmp_path_factory.mktemp("checkpoints")
    return functools.cache(lambda family: make_checkpoint(family, root / family))


@pytest.fixture(scope="module")
def oracle(checkpoints: Checkpoints) -> Callable[[str], Any]:
    return functools.cache(lambda family: transformers_model(checkpoints(family)))


def prompts(lengths: list[int], seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def difference(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    assert [rows.shape for rows in actual] == [rows.shape for rows in expected]
    return max((left - right).abs().max().item() for left, right in zip(actual, expected, strict=True))


@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_a_full_forward(
    family: str, backend: str, block_size: int, checkpoints: Checkpoints, oracle: Callable[[str], Any]
) -> None:
    """Ragged batches, in chunks of any size, with the blocks that windows pass freed and poisoned on the way."""
    paged = PagedModel(checkpoints(family), backend, block_size)
    ids = prompts(LENGTHS)
    expected = transformers_logits(oracle(family), ids)
    for chunks in ([45, 7, 1, 30], [11, 3, 1, 17], [1, 2, 1, 16]):
        actual = paged.logits(ids, chunks)
        assert actual[0].dtype == torch.float32
        assert difference(actual, expected) <= TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_generate(
    family: str, backend: str, checkpoints: Checkpoints, oracle: Callable[[str], Any]
) -> None:
    ids = prompts([20, 3, 33], seed=2)
    tokens = PagedModel(checkpoints(family), backend, 16).greedy(ids, 24)
    assert tokens == transformers_greedy(oracle(family), ids, 24)
    assert len({token for output in tokens for token in output}) > 8, "too dull an output to tell anything"


def test_bfloat16_errs_no_more_than_transformers(tmp_path: pathlib.Path) -> None:
    path = make_checkpoint("llama", tmp_path, dtype="bfloat16")
    paged = PagedModel(path, "cpu", 16, dtype="bfloat16")
    assert paged.kv.dtype == torch.bfloat16
    ids = prompts(LENGTHS)
    oracle = transformers_model(path)
    theirs = [rows.float() for rows in transformers_logits(oracle, ids)]
    exact = transformers_logits(oracle.float(), ids)
    assert difference(paged.logits(ids, [11, 3, 1, 17]), exact) < 1.5 * difference(theirs, exact)


def test_only_the_rows_asked_for_have_logits(checkpoints: Checkpoints, oracle: Callable[[str], Any]) -> None:
    paged = PagedModel(checkpoints("gemma2"), "cpu", 8)
    ids = prompts([9, 5, 12])
    expected = transformers_logits(oracle("gemma2"), ids)
    counts = [1, 0, 3]
    items = [BatchItem(row, 0, paged.new_tables(len(row)), n) for row, n in zip(ids, counts, strict=True)]
    actual = paged.runner.execute(items)
    assert difference([actual], [torch.cat([expected[0][-1:], expected[2][-3:]])]) <= TOLERANCE


def test_a_step_may_ask_for_no_logits(checkpoints: Checkpoints) -> None:
    paged = PagedModel(checkpoints("llama"), "cpu", 8)
    out = paged.runner.execute([BatchItem([5, 6, 7], 0, paged.new_tables(3))])
    assert out.shape == (0, VOCAB_SIZE)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_layers_are_announced_in_order_once_written(family: str, checkpoints: Checkpoints) -> None:
    paged = PagedModel(checkpoints(family), "cpu", 8)
    tables = paged.new_tables(5)
    seen: list[int] = []

    def on_layer(layer: int) -> None:
        group, slot = paged.layout.location(layer)
        assert paged.kv[slot, tables[group][0], :, :, :5].isfinite().all()
        seen.append(layer)

    paged.runner.execute([BatchItem([5, 6, 7, 8, 9], 0, tables)], on_layer)
    assert seen == list(range(paged.layout.num_layers))


def test_executing_the_same_tokens_again_changes_nothing(checkpoints: Checkpoints) -> None:
    """Recomputing after a preemption writes the same keys and values."""
    paged = PagedModel(checkpoints("qwen3"), "cpu", 8)
    tables = paged.new_tables(20)
    item = BatchItem(list(range(30, 50)), 0, tables, 20)
    first, before = paged.runner.execute([item]), paged.kv.clone()
    assert torch.equal(paged.runner.execute([item]), first)
    assert torch.allclose(paged.kv, before, rtol=0, atol=0, equal_nan=True)
