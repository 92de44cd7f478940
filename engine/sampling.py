"""Chooses the next token of each sequence from its logits.

The engine thread calls `sample` once a step with all rows that need a token. The order, where a row uses them: grammar,
logit bias, `min_tokens`, repetition, presence and frequency penalties (as in vLLM), then temperature, top-k, top-p and
min-p (as in transformers). A step whose rows use none of them costs one argmax.

A sampled token is a function of its row's logits and of (seed, choice, position) alone: one Philox number inverts the
cumulative distribution. So the same request draws the same tokens in any batch, on any worker, before and after a
replay. The distribution is summed in the order of token ids, not of probabilities: rounding that swaps two almost equal
probabilities then hardly moves a boundary, where a sum in sorted order would exchange whole intervals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from baton.requests import Logprobs
from engine import choosing_cpu, choosing_torch
from engine.grammar import mask_logits
from engine.philox import uniforms
from engine.sampling_state import Ids, SamplingState, Uniforms, Values

__all__ = ["SampledTokens", "SamplingState", "ranked", "sample"]


@dataclasses.dataclass(frozen=True, slots=True)
class SampledTokens:
    """One entry for each row; logprobs are None where the row asked for none."""

    token_ids: list[int]
    logprobs: list[Logprobs | None]


def sample(logits: torch.Tensor, states: Sequence[SamplingState]) -> SampledTokens:
    """The next token of each row, and its logprobs where asked for.

    Args:
        logits: float32 [len(states), vocabulary], left as it is.
        states: one for each row; the caller appends the tokens afterwards.
    """
    assert logits.dtype == torch.float32
    assert len(logits) == len(states)
    if all(state.plain for state in states):
        token_ids = _chooser(logits.device).argmax(logits)
        return SampledTokens(token_ids, _logprobs(logits, token_ids, states))
    token_ids = [0] * len(states)
    as_they_are = [row for row, state in enumerate(states) if not state.is_edited]
    edited = [row for row, state in enumerate(states) if state.is_edited]
    if as_they_are:
        _choose(logits, as_they_are, as_they_are, states, token_ids)
    if edited:
        _choose(_edit(logits[edited], [states[row] for row in edited]), range(len(edited)), edited, states, token_ids)
    return SampledTokens(token_ids, _logprobs(logits, token_ids, states))


def ranked(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` largest logits of each row and their ids, largest first; among equals the lowest ids, lowest first.

    Returns:
        float32 [R, k] and int64 [R, k].
    """
    return _chooser(logits.device).ranked(logits, k)


class _Chooser(Protocol):
    """What depends on where logits lie."""

    def argmax(self, logits: torch.Tensor) -> list[int]: ...

    def choose(
        self, logits: torch.Tensor, rows: Sequence[int], states: Sequence[SamplingState], numbers: Uniforms
    ) -> list[int]: ...

    def ranked(self, logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]: ...


def _chooser(device: torch.device) -> _Chooser:
    return choosing_cpu if device.type == "cpu" else choosing_torch


def _choose(
    logits: torch.Tensor,
    rows: Sequence[int],
    places: Sequence[int],
    states: Sequence[SamplingState],
    token_ids: list[int],
) -> None:
    """Fill in the tokens at `places`, which have the states there and these rows of edited logits."""
    some = [states[place] for place in places]
    numbers = np.zeros(len(some))
    drawn = [index for index, state in enumerate(some) if not state.greedy]
    if drawn:
        words = np.array([(some[index].seed, some[index].choice, some[index].position) for index in drawn], np.uint64)
        numbers[drawn] = uniforms(words[:, 0], words[:, 1], words[:, 2])
    for place, token_id in zip(places, _chooser(logits.device).choose(logits, rows, some, numbers), strict=True):
        token_ids[place] = token_id


def _edit(logits: torch.Tensor, states: Sequence[SamplingState]) -> torch.Tensor:
    """Applies grammars, bias, masks and penalties in place; returns the same logits [R, V]."""
    guided = [(row, state.guide) for row, state in enumerate(states) if state.guide is not None]
    if guided:
        mask_logits(logits, guided)
    _add_bias(logits, states)
    _mask_endings(logits, states)
    _penalise(logits, states)
    return logits


# Edits of single logits. Ids beyond the vocabulary are skipped: clients may name any.


def _add_bias(logits: torch.Tensor, states: Sequence[SamplingState]) -> None:
    biased = [(row, *state.bias) for row, state in enumerate(states) if state.bias is not None]
    if biased:
        rows, ids, values = _cells(logits, biased)
        logits[rows, ids] += values


def _mask_endings(logits: torch.Tensor, states: Sequence[SamplingState]) -> None:
    masked = [
        (row, state.endings, np.full(len(state.endings), -np.inf, np.float32))
        for row, state in enumerate(states)
        if state.masks_endings
    ]
    if masked:
        rows, ids, values = _cells(logits, masked)
        logits[rows, ids] = values


def _penalise(logits: torch.Tensor, states: Sequence[SamplingState]) -> None:
    counted = [
        (row, state.counts.token_ids, state.counts.counts)
        for row, state in enumerate(states)
        if state.counts is not None
    ]
    if not counted:
        return
    rows, ids, counts = _cells(logits, counted)
    repetition = _column(states, lambda state: state.params.repetition_penalty, logits)[rows, 0]
    presence = _column(states, lambda state: state.params.presence_penalty, logits)[rows, 0]
    frequency = _column(states, lambda state: state.params.frequency_penalty, logits)[rows, 0]
    cells = logits[rows, ids]
    cells = torch.where(cells > 0, cells / repetition, cells * repetition)
    logits[rows, ids] = cells - frequency * counts - presence * (counts > 0)


def _cells(
    logits: torch.Tensor, parts: Sequence[tuple[int, Ids, Values]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rows, ids, values) of the cells that (row, ids, values) parts name, flat, on the logits' device."""
    rows = np.repeat([row for row, _, _ in parts], [len(ids) for _, ids, _ in parts])
    ids = np.concatenate([ids for _, ids, _ in parts])
    values = np.concatenate([values for _, _, values in parts])
    known = (ids >= 0) & (ids < logits.shape[1])
    flat = (torch.from_numpy(array[known]).to(logits.device) for array in (rows, ids, values))
    return next(flat), next(flat), next(flat)


def _logprobs(logits: torch.Tensor, token_ids: Sequence[int], states: Sequence[SamplingState]) -> list[Logprobs | None]:
    """Logprobs of the model's own distribution: before edits, temperature and filters."""
    logprobs: list[Logprobs | None] = [None] * len(states)
    wanted = {row: state.params.logprobs for row, state in enumerate(states) if state.params.logprobs is not None}
    if not wanted:
        return logprobs
    rows = list(wanted)
    wanted_logits = logits[rows]
    normaliser = wanted_logits.logsumexp(-1, keepdim=True)
    own = torch.tensor([[token_ids[row]] for row in rows], device=logits.device)
    sampled = (wanted_logits.gather(-1, own) - normaliser).squeeze(-1).tolist()
    top_values: list[list[float]] = [[]] * len(rows)
    top_ids: list[list[int]] = [[]] * len(rows)
    if num_top := min(max(wanted.values()), wanted_logits.shape[1]):
        values, ids = ranked(wanted_logits, num_top)
        top_values, top_ids = (values - normaliser).tolist(), ids.tolist()
    for index, (row, count) in enumerate(wanted.items()):
        top = zip(top_ids[index][:count], top_values[index][:count], strict=True)
        logprobs[row] = Logprobs(sampled[index], tuple(top))
    return logprobs


def _column(
    states: Sequence[SamplingState],
    parameter: Callable[[SamplingState], float],
    like: torch.Tensor,
) -> torch.Tensor:
    """A parameter of each row: [R, 1] on the device and of the dtype of `like`."""
    return torch.tensor([[parameter(state)] for state in states], dtype=like.dtype, device=like.device)
