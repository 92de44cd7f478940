"""What only a GPU shows: captured graphs, steps that overlap, tokens that stay on the device."""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from baton.config import DecodeConfig
from baton.requests import SamplingParams
from engine.decode_graphs import CudaCapture
from engine.model_runner import ModelRunner
from engine.sampling import draw, sample
from engine.sampling_state import SamplingState
from engine.staging import Array, Fetch, to_device
from tests.cluster.oracle import prompt_of
from tests.composed import Pair, finish_alone
from tests.engine.checkpoints import FAMILIES, VOCAB_SIZE, make_checkpoint
from tests.engine.paged_model import PagedModel, transformers_greedy, transformers_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

Checkpoints = Callable[[str], pathlib.Path]
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    root = tmp_path_factory.mktemp("checkpoints")
    return functools.cache(lambda family: make_checkpoint(family, root / family))


@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_graphs_give_the_tokens_of_transformers(family: str, checkpoints: Checkpoints) -> None:
    model = PagedModel(checkpoints(family), "triton", 16)
    backend = model.runner._backend
    model.runner = ModelRunner(model.model, model.layout, model.kv, backend, max_graph_rows=8)
    prompts = [prompt_of(length, index) for index, length in enumerate((40, 7, 1))]
    assert model.greedy(prompts, 20) == transformers_greedy(transformers_model(checkpoints(family)), prompts, 20)
    assert model.runner._graphs is not None
    # Experts that are looked up on the host cannot be captured; all else must be.
    assert len(model.runner._graphs._graphs) > 0 or family == "gpt_oss"


def test_a_capture_that_fails_leaves_nothing_behind() -> None:
    numbers = torch.ones(4, device=CUDA)
    stream = torch.cuda.current_stream()

    def wait() -> None:
        numbers.nonzero()

    def double() -> None:
        numbers.mul_(2)

    with pytest.raises(RuntimeError):
        CudaCapture()(wait)
    assert torch.cuda.current_stream() == stream
    torch.cuda.empty_cache()
    CudaCapture()(double)()
    assert numbers.tolist() == [2.0] * 4


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_overlapping_steps_on_a_gpu_give_the_tokens_of_a_cpu(family: str, checkpoints: Checkpoints) -> None:
    """Through a transfer between two pools on the GPU as well."""
    kinds: list[dict[str, Any]] = [
        {"max_tokens": 24},
        {"max_tokens": 24, "temperature": 0.8, "seed": 1, "n": 2, "logprobs": 2},
        {"max_tokens": 24, "temperature": 1.0, "seed": 2, "presence_penalty": 1.0},
    ]
    with contextlib.closing(Pair(checkpoints(family))) as on_cpu:
        wanted = [finish_alone(on_cpu, prompt_of(30, index), **kind) for index, kind in enumerate(kinds)]
    decode = DecodeConfig(prefill_chunk_tokens=9)
    with contextlib.closing(Pair(checkpoints(family), attention="triton", device="cuda", decode=decode)) as pair:
        specs = [
            pair.start(pair.spec(prompt_of(30, index), **kind), local_prefill=local)
            for local in (False, True)
            for index, kind in enumerate(kinds)
        ]
        pair.run()
        got = [[pair.tokens(spec, choice) for choice in range(spec.sampling.n)] for spec in specs]
        pair.assert_empty()
    assert got == [*wanted, *wanted]


def test_drawn_tokens_and_logprobs_are_those_of_a_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(6, VOCAB_SIZE, generator=generator)).bfloat16().float()
    params = [
        SamplingParams(max_tokens=9, temperature=0.0, logprobs=3),
        SamplingParams(max_tokens=9, temperature=0.9, seed=1, top_p=0.8),
        SamplingParams(max_tokens=9, temperature=0.9, seed=2, top_k=7, logprobs=0),
        SamplingParams(max_tokens=9, temperature=0.9, seed=3, logit_bias={5: 3.0}),
        SamplingParams(max_tokens=9, temperature=0.9, seed=4, min_tokens=4, stop_token_ids=(1, 2)),
        SamplingParams(max_tokens=9, temperature=0.9, seed=5, frequency_penalty=0.5),
    ]
    states = [SamplingState(each, [1, 2]) for each in params]
    for state in states:
        state.extend([3, 4])
    wanted = sample(logits, states)
    drawn = draw(logits.to(CUDA), states)
    assert drawn.token_ids.is_cuda
    got = drawn.read()
    assert got.token_ids == wanted.token_ids
    for mine, theirs in zip(got.logprobs, wanted.logprobs, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert mine.sampled == pytest.approx(theirs.sampled, abs=1e-5)
            assert [token_id for token_id, _ in mine.top] == [token_id for token_id, _ in theirs.top]


def test_arrays_pass_to_the_device_and_back() -> None:
    arrays: list[Array] = [np.arange(5), np.zeros((2, 0), np.int32), np.array([[1.5, -2.0]], np.float64)]
    tensors = to_device(arrays, CUDA)
    assert all(tensor.is_cuda for tensor in tensors)
    for array, tensor in zip(arrays, Fetch(tensors).wait(), strict=True):
        assert not tensor.is_cuda
        assert np.array_equal(array, tensor.numpy())
