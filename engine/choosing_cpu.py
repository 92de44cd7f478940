"""Chooses tokens from logits in host memory with numba kernels; `engine.sampling` says by which rules.

What torch does in several passes over the vocabulary, a kernel does in one, and without the GIL.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.cpu_kernels import choosing
from engine.philox import uniforms
from engine.sampling_state import SamplingState, Uniforms

# Logits whose weights are made and drawn from at a time: they stay in the second-level cache.
_CACHED_CELLS = 1 << 18


def prepare() -> None:
    """Compile now what a request would otherwise wait for."""
    choosing.compile_all()


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """The most likely token of each row of logits [R, V]: the lowest id among equals; int64 [R].

    Numpy's argmax is vectorised: ten times as fast as torch's.
    """
    return torch.from_numpy(logits.numpy().argmax(-1))


def choose(logits: torch.Tensor, rows: Sequence[int], states: Sequence[SamplingState]) -> torch.Tensor:
    """The next tokens of some rows of edited logits.

    Args:
        logits: float32 [R, V], left as they are.
        rows: which of them, each once, in order.
        states: one for each of `rows`.

    Returns:
        int64 [len(rows)], on the logits' device.
    """
    numbers = numbers_for(states)
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
    return torch.from_numpy(token_ids)


def numbers_for(states: Sequence[SamplingState]) -> Uniforms:
    """What inverts the cumulative distribution of each row's next token: in [0, 1), 0 for those that are greedy."""
    numbers = np.zeros(len(states))
    drawn = [index for index, state in enumerate(states) if not state.greedy]
    if drawn:
        some = [states[index] for index in drawn]
        words = np.array([(state.seed, state.choice, state.next_position) for state in some], np.uint64)
        numbers[drawn] = uniforms(words[:, 0], words[:, 1], words[:, 2])
    return numbers


def ranked(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` largest logits of each row and their ids, largest first; among equals the lowest ids, lowest first.

    Returns:
        float32 [R, k] and int64 [R, k].
    """
    values, ids = np.empty((len(logits), k), np.float32), np.empty((len(logits), k), np.int64)
    choosing.rank(np.ascontiguousarray(logits.numpy()), values, ids)
    return torch.from_numpy(values), torch.from_numpy(ids)


def _limits(states: Sequence[SamplingState]) -> tuple[Uniforms, Uniforms]:
    """Top-p and min-p of each row."""
    return (
        np.array([state.params.top_p for state in states], np.float64),
        np.array([state.params.min_p for state in states], np.float64),
    )
