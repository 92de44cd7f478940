"""Logprobs of a prompt equal `transformers`' float32 log-softmax, whatever the chunks, the batch and the caches."""

from __future__ import annotations

import itertools
import pathlib
from typing import Literal

import pytest
import torch
from transformers import AutoModelForCausalLM

from baton.config import CacheConfig, ModelConfig
from baton.requests import AttemptRef, Logprobs, RequestSpec, SamplingParams
from engine.batch import BatchItem
from engine.engine import Engine, load_engine
from engine.prompt_logprobs import num_logits, score_chunk
from tests.cluster.oracle import prompt_of
from tests.engine.checkpoints import make_checkpoint


def spec_of(prompt: list[int], num_top: int | None) -> RequestSpec:
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=num_top)
    return RequestSpec(ref=AttemptRef("r", 1), router_id="router", prompt_token_ids=tuple(prompt), sampling=sampling)


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return make_checkpoint(request.param, tmp_path_factory.mktemp("models") / request.param)


def expected(model: pathlib.Path, prompt: list[int]) -> torch.Tensor:
    """float32 [len(prompt) - 1, vocabulary]: what follows each position but the last."""
    oracle = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        logits: torch.Tensor = oracle(torch.tensor([prompt])).logits
    return logits[0, :-1].log_softmax(-1)


def assert_equal(scored: list[Logprobs], prompt: list[int], logprobs: torch.Tensor, num_top: int) -> None:
    assert len(scored) == len(prompt) - 1
    for entry, token_id, row in zip(scored, prompt[1:], logprobs, strict=True):
        assert entry.sampled == pytest.approx(float(row[token_id]), abs=1e-4)
        values, ids = row.topk(num_top)
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)
        if all(larger - smaller > 1e-3 for larger, smaller in itertools.pairwise(values.tolist())):
            assert [token_id for token_id, _ in entry.top] == ids.tolist()


@pytest.mark.parametrize("block_size", [8, 32])
def test_chunks_of_any_size_score_the_whole_prompt(model: pathlib.Path, block_size: Literal[8, 32]) -> None:
    prompt = prompt_of(61)
    logprobs = expected(model, prompt)
    engine: Engine = load_engine(
        ModelConfig(path=str(model)), CacheConfig(block_size=block_size, kv_cache_bytes=4 << 20), chunk_tokens=61
    )
    spec = spec_of(prompt, 3)
    for chunk_tokens in (7, 60, 61):
        blocks = engine.cache.begin()
        scored: list[Logprobs] = []
        for start in range(0, 61, chunk_tokens):
            end = min(61, start + chunk_tokens)
            assert engine.cache.allocate(blocks, end)
            item = BatchItem(prompt[start:end], start, blocks.rows(), num_logits(spec, start, end))
            chunk = score_chunk(spec, start, engine.runner.execute([item]))
            assert chunk.start == len(scored) + 1
            scored += chunk.logprobs
        engine.cache.free(blocks)
        assert_equal(scored, prompt, logprobs, 3)


def test_only_a_scored_prompt_needs_logits_of_every_position() -> None:
    assert [num_logits(spec_of([5] * 10, 0), start, start + 5) for start in (0, 5)] == [5, 5]
    assert [num_logits(spec_of([5] * 10, None), start, start + 5) for start in (0, 5)] == [0, 1]


def test_rows_are_read_a_bounded_number_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(9, 50, generator=torch.Generator().manual_seed(0))
    whole = score_chunk(spec_of(list(range(10)), 2), 0, logits)
    monkeypatch.setattr("engine.prompt_logprobs.MAX_CELLS", 120)
    assert score_chunk(spec_of(list(range(10)), 2), 0, logits) == whole


def test_equal_logits_are_ranked_by_their_ids() -> None:
    (entry,) = score_chunk(spec_of([0, 1], 3), 0, torch.zeros(2, 8)).logprobs
    assert [token_id for token_id, _ in entry.top] == [0, 1, 2]


def test_the_last_chunk_scores_one_token_less_than_it_computes() -> None:
    logits = torch.zeros(10, 8)
    sizes = [
        len(score_chunk(spec_of([1] * 10, 0), start, logits[start:end]).logprobs)
        for start, end in itertools.pairwise([0, 4, 9, 10])
    ]
    assert sizes == [4, 5, 0]
