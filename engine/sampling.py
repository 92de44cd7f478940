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
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from baton.requests import Logprobs, SamplingParams
from engine import choosing_cpu
from engine.grammar import mask_logits
from engine.sampling_state import Ids, SamplingState, Values
from engine.staging import Fetch, to_device

__all__ = ["Drawn", "SampledTokens", "SamplingState", "draw", "prepare", "ranked", "sample"]


@dataclasses.dataclass(frozen=True, slots=True)
class SampledTokens:
    """One entry for each row; logprobs are None where the row asked for none."""

    token_ids: list[int]
    logprobs: list[Logprobs | None]


class Drawn:
    """Tokens that were chosen, by a device that may not be through yet.

    Attributes:
        token_ids: int64 [R], on the logits' device.
    """

    def __init__(self, token_ids: torch.Tensor, logprobs: _LogprobTensors | None) -> None:
        self.token_ids = token_ids
        self._wanted: Mapping[int, int] = {} if logprobs is None else logprobs.wanted
        self._fetch = Fetch([token_ids, *(() if logprobs is None else logprobs.tensors)])

    def read(self) -> SampledTokens:
        """Waits for the device."""
        token_ids, *tensors = self._fetch.wait()
        ids: list[int] = token_ids.tolist()
        logprobs: list[Logprobs | None] = [None] * len(ids)
        if tensors:
            sampled, values, top_ids = (tensor.tolist() for tensor in tensors)
            for index, (row, count) in enumerate(self._wanted.items()):
                top = zip(top_ids[index][:count], values[index][:count], strict=True)
                logprobs[row] = Logprobs(sampled[index], tuple(top))
        return SampledTokens(ids, logprobs)


def sample(logits: torch.Tensor, states: Sequence[SamplingState]) -> SampledTokens:
    """The next token of each row, and its logprobs where asked for; see `draw`."""
    return draw(logits, states).read()


def draw(logits: torch.Tensor, states: Sequence[SamplingState]) -> Drawn:
    """Choose the next token of each row.

    Args:
        logits: float32 [len(states), vocabulary], left as they are.
        states: one for each row; the caller appends the tokens afterwards.
    """
    assert logits.dtype == torch.float32
    assert len(logits) == len(states)
    chooser = _chooser(logits.device)
    edited = [row for row, state in enumerate(states) if state.is_edited]
    if not edited:
        if all(state.greedy for state in states):
            token_ids = chooser.argmax(logits)
        else:
            token_ids = chooser.choose(logits, range(len(states)), states)
    else:
        token_ids = torch.empty(len(states), dtype=torch.int64, device=logits.device)
        as_they_are = [row for row, state in enumerate(states) if not state.is_edited]
        edited_rows, other_rows = to_device([np.array(edited), np.array(as_they_are, np.int64)], logits.device)
        some = [states[row] for row in edited]
        token_ids[edited_rows] = chooser.choose(_edit(logits[edited_rows], some), range(len(some)), some)
        if as_they_are:
            token_ids[other_rows] = chooser.choose(logits, as_they_are, [states[row] for row in as_they_are])
    return Drawn(token_ids, _logprobs(logits, token_ids, states))


def ranked(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` largest logits of each row and their ids, largest first; among equals the lowest ids, lowest first.

    Returns:
        float32 [R, k] and int64 [R, k].
    """
    return _chooser(logits.device).ranked(logits, k)


def prepare(vocab_size: int, device: torch.device) -> None:
    """Compile now what a request would otherwise wait for: what draws from logits [rows, vocab_size] on `device`."""
    if device.type == "cpu":
        choosing_cpu.prepare()
    else:
        sample(torch.zeros(1, vocab_size, device=device), [SamplingState(SamplingParams(max_tokens=1), ())])


class _Chooser(Protocol):
    """What depends on where logits lie; `engine.choosing_cpu` says what each does."""

    def argmax(self, logits: torch.Tensor) -> torch.Tensor: ...

    def choose(self, logits: torch.Tensor, rows: Sequence[int], states: Sequence[SamplingState]) -> torch.Tensor: ...

    def ranked(self, logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]: ...


def _chooser(device: torch.device) -> _Chooser:
    if device.type == "cpu":
        return choosing_cpu
    # Without a GPU there need not be Triton either.
    from engine import choosing_gpu

    return choosing_gpu


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
    flat_rows, flat_ids, flat_values = to_device([rows[known], ids[known], values[known]], logits.device)
    return flat_rows, flat_ids, flat_values


@dataclasses.dataclass(frozen=True, slots=True)
class _LogprobTensors:
    """Logprobs of the rows that ask for them.

    Attributes:
        wanted: how many of the most likely tokens each of these rows asks for.
        tensors: of the tokens chosen, float32 [rows]; the most likely tokens', float32 [rows, most], and their ids.
    """

    wanted: Mapping[int, int]
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _logprobs(logits: torch.Tensor, token_ids: torch.Tensor, states: Sequence[SamplingState]) -> _LogprobTensors | None:
    """Logprobs of the model's own distribution: before edits, temperature and filters."""
    wanted = {row: state.params.logprobs for row, state in enumerate(states) if state.params.logprobs is not None}
    if not wanted:
        return None
    (rows,) = to_device([np.array(list(wanted))], logits.device)
    wanted_logits = logits[rows]
    normaliser = wanted_logits.logsumexp(-1, keepdim=True)
    sampled = (wanted_logits.gather(-1, token_ids[rows, None]) - normaliser).squeeze(-1)
    num_top = min(max(wanted.values()), wanted_logits.shape[1])
    values, ids = ranked(wanted_logits, num_top) if num_top else (wanted_logits[:, :0], rows[:, None][:, :0])
    return _LogprobTensors(wanted, (sampled, values - normaliser, ids))


def _column(
    states: Sequence[SamplingState],
    parameter: Callable[[SamplingState], float],
    like: torch.Tensor,
) -> torch.Tensor:
    """A parameter of each row: [R, 1] on the device and of the dtype of `like`."""
    (column,) = to_device([np.array([[parameter(state)] for state in states])], like.device)
    return column.to(like.dtype)
