"""Chooses tokens from logits in host memory with numba kernels; `engine.sampling` says by which rules.

What torch does in several passes over the vocabulary, a kernel does in one, and without the GIL.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.cpu_kernels import choosing
from engine.sampling_state import SamplingState, Uniforms

# Logits whose weights are made and drawn from at a time: they stay in the second-level cache.
_CACHED_CELLS = 1 << 18


def prepare() -> None:
    """Compile now what a request would otherwise wait for."""
    choosing.compile_all()


def argmax(logits: torch.Tensor) -> list[int]:
    """See `engine.choosing_torch.argmax`. Numpy's is vectorised: ten times as fast as torch's."""
    token_ids: list[int] = logits.numpy().argmax(-1).tolist()
    return token_ids


def choose(logits: torch.Tensor, rows: Sequence[int], states: Sequence[SamplingState], numbers: Uniforms) -> list[int]:
    """See `engine.choosing_torch.choose`."""
    array = np.ascontiguousarray(logits.numpy())
    token_ids = np.zeros(len(rows), np.int64)
    ranked_places: list[int] = []
    weighed_places: list[int] = []
    for place, (row, state) in enumerate(zip(rows, states, strict=True)):
        if state.greedy:
            token_ids[place] = array[row].argmax()
        else:
            (ranked_places if state.params.top_k else weighed_places).append(place)
    if ranked_places:
        some = [states[place] for place in ranked_places]
        drawn = np.zeros(len(some), np.int64)
        choosing.draw_ranked(
            array,
            np.array([rows[place] for place in ranked_places], np.int64),
            np.array([min(state.params.top_k, array.shape[1]) for state in some], np.int64),
            np.array([state.params.temperature for state in some], np.float64),
            *_limits(some),
            numbers[ranked_places],
            drawn,
        )
        token_ids[ranked_places] = drawn
    stride = max(1, _CACHED_CELLS // array.shape[1])
    for first in range(0, len(weighed_places), stride):
        places = weighed_places[first : first + stride]
        some = [states[place] for place in places]
        weights = logits[[rows[place] for place in places]]
        weights -= weights.amax(-1, keepdim=True)
        weights /= torch.tensor([[state.params.temperature] for state in some], dtype=torch.float32)
        drawn = np.zeros(len(some), np.int64)
        choosing.draw(weights.exp_().numpy(), *_limits(some), numbers[places], drawn)
        token_ids[places] = drawn
    chosen: list[int] = token_ids.tolist()
    return chosen


def ranked(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See `engine.choosing_torch.ranked`."""
    values, ids = np.empty((len(logits), k), np.float32), np.empty((len(logits), k), np.int64)
    choosing.rank(np.ascontiguousarray(logits.numpy()), values, ids)
    return torch.from_numpy(values), torch.from_numpy(ids)


def _limits(states: Sequence[SamplingState]) -> tuple[Uniforms, Uniforms]:
    """Top-p and min-p of each row."""
    return (
        np.array([state.params.top_p for state in states], np.float64),
        np.array([state.params.min_p for state in states], np.float64),
    )
