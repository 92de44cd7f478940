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

import numpy as np
import torch

from baton.requests import Logprobs
from engine.grammar import mask_logits
from engine.philox import uniforms
from engine.sampling_state import Ids, SamplingState, Values

__all__ = ["SampledTokens", "SamplingState", "ranked", "sample"]

# Candidates that are ranked where top-p alone limits them; a nucleus of more is found without ranking.
_NUCLEUS_CANDIDATES = 128


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
        token_ids = _argmax(logits, states)
    else:
        token_ids = torch.empty(len(states), dtype=torch.int64, device=logits.device)
        methods = [_method(state) for state in states]
        for method in (_argmax, _draw, _draw_ranked):
            rows = [row for row, of_row in enumerate(methods) if of_row is method]
            if rows:
                chosen = [states[row] for row in rows]
                token_ids[rows] = method(_edit(logits[rows], chosen), chosen)
    return SampledTokens(token_ids.tolist(), _logprobs(logits, token_ids, states))


def _method(state: SamplingState) -> Callable[[torch.Tensor, Sequence[SamplingState]], torch.Tensor]:
    """The function that chooses a row's token: token ids [R] from edited logits [R, V], which it may overwrite."""
    if state.greedy:
        return _argmax
    return _draw_ranked if state.params.top_k > 0 or state.params.top_p < 1.0 else _draw


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


# Choosing from what is left.


def _argmax(logits: torch.Tensor, states: Sequence[SamplingState]) -> torch.Tensor:
    """The most likely token of each row: the lowest id among equals."""
    return logits.argmax(-1)


def _draw(logits: torch.Tensor, states: Sequence[SamplingState]) -> torch.Tensor:
    """Draws from the whole vocabulary, but for what min-p excludes."""
    logits /= _column(states, lambda state: state.params.temperature, logits)
    weights = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    if any(state.params.min_p > 0 for state in states):
        weights *= weights >= _column(states, lambda state: state.params.min_p, weights)
    # Converting first is seven times as fast as cumsum(dtype=float64) on a CPU.
    return _invert(weights.double().cumsum_(-1), states)


def _draw_ranked(logits: torch.Tensor, states: Sequence[SamplingState]) -> torch.Tensor:
    """Draws from what top-k, then top-p, then min-p leave."""
    logits /= _column(states, lambda state: state.params.temperature, logits)
    vocabulary = logits.shape[1]
    limits = [state.params.top_k or _NUCLEUS_CANDIDATES for state in states]
    values, ids = ranked(logits, min(vocabulary, max(limits)))
    peak = values[:, :1]
    weights = (values - peak).exp_().double()
    weights *= torch.arange(values.shape[1], device=ids.device) < torch.tensor(limits, device=ids.device).unsqueeze(-1)
    total = weights.sum(-1, keepdim=True)
    unlimited = [row for row, state in enumerate(states) if state.params.top_k == 0]
    if unlimited:
        total[unlimited] = _sum((logits[unlimited] - peak[unlimited]).exp_())
    top_p = _column(states, lambda state: state.params.top_p, weights)
    mass = top_p * total
    cumulative = weights.cumsum(-1)
    nucleus = (cumulative - weights < mass) | (top_p >= 1)
    nucleus[:, 0] = True
    weights *= nucleus & (weights >= _column(states, lambda state: state.params.min_p, weights))

    ids, order = ids.sort(-1)
    drawn = _invert(weights.gather(-1, order).cumsum_(-1), states)
    token_ids = ids.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
    covered = (cumulative[:, -1] >= mass[:, 0]).tolist() if unlimited else []
    large = [row for row in unlimited if not covered[row]]
    if large:
        token_ids[large] = _draw_nucleus(logits[large], [states[row] for row in large])
    return token_ids


def _draw_nucleus(scaled: torch.Tensor, states: Sequence[SamplingState]) -> torch.Tensor:
    """Draws from what top-p, then min-p leave, in a time that does not grow with the nucleus.

    The smallest weight of the nucleus is found by bisection over bit patterns, in whose order floats from 0 on lie.

    Args:
        scaled: logits over temperature, [R, V].
    """
    weights = (scaled - scaled.amax(-1, keepdim=True)).exp_()
    patterns = weights.view(torch.int32)
    mass = _column(states, lambda state: state.params.top_p, weights, torch.float64) * _sum(weights)
    low = torch.zeros(len(states), 1, dtype=torch.int32, device=weights.device)
    high = torch.ones_like(low, dtype=torch.float32).view(torch.int32) + 1
    for _ in range(30):  # the pattern of 1.0 has 30 bits
        middle = (low + high) // 2
        enough = _sum(weights * (patterns >= middle)) >= mass
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    larger, smallest = patterns > low, patterns == low
    # Of equal weights the lowest ids, as many as the mass still lacks.
    num_smallest = ((mass - _sum(weights * larger)) / low.view(torch.float32)).ceil()
    nucleus = larger | (smallest & (smallest.cumsum(-1) <= num_smallest))
    weights *= nucleus & (weights >= _column(states, lambda state: state.params.min_p, weights))
    return _invert(weights.double().cumsum_(-1), states)


def _sum(weights: torch.Tensor) -> torch.Tensor:
    """Sum of each row: float64 [R, 1]."""
    return weights.sum(-1, keepdim=True, dtype=torch.float64)


def _invert(cdf: torch.Tensor, states: Sequence[SamplingState]) -> torch.Tensor:
    """The first entry [R] of each row of `cdf` that exceeds the row's random number.

    Args:
        cdf: float64 [R, n], cumulative and not normalised.
    """
    words = np.array([(state.seed, state.choice, state.position) for state in states], np.uint64)
    numbers = torch.from_numpy(uniforms(words[:, 0], words[:, 1], words[:, 2])).to(cdf.device).unsqueeze(-1)
    index = torch.searchsorted(cdf, numbers * cdf[:, -1:], right=True).squeeze(-1)
    # NaN logits exceed nothing; one broken row must not index beyond the vocabulary and take the batch with it.
    return index.clamp_(max=cdf.shape[1] - 1)


def ranked(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` largest logits of each row and their ids, largest first; among equals the lowest ids, lowest first.

    `torch.topk` leaves open which of several equal logits it returns, and bfloat16 models make equal logits often.

    Returns:
        float32 [R, k] and int64 [R, k].
    """
    values, ids = logits.topk(k)
    smallest = values[:, -1:]
    num_larger = (values > smallest).sum(-1)
    # All ids whose logit equals the smallest taken, in order; each row keeps as many as it has places for. What a
    # grammar excludes is equal too, but most of the vocabulary, and never chosen.
    rows, tied_ids = ((logits == smallest) & (smallest > -torch.inf)).nonzero(as_tuple=True)
    places = num_larger[rows] + torch.arange(len(rows), device=rows.device) - torch.searchsorted(rows, rows)
    kept = places < k
    ids[rows[kept], places[kept]] = tied_ids[kept]
    ids, order = ids.sort(-1)
    values, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)


def _logprobs(logits: torch.Tensor, token_ids: torch.Tensor, states: Sequence[SamplingState]) -> list[Logprobs | None]:
    """Logprobs of the model's own distribution: before edits, temperature and filters."""
    logprobs: list[Logprobs | None] = [None] * len(states)
    wanted = {row: state.params.logprobs for row, state in enumerate(states) if state.params.logprobs is not None}
    if not wanted:
        return logprobs
    rows = list(wanted)
    wanted_logits = logits[rows]
    normaliser = wanted_logits.logsumexp(-1, keepdim=True)
    sampled = (wanted_logits.gather(-1, token_ids[rows].unsqueeze(-1)) - normaliser).squeeze(-1).tolist()
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
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """A parameter of each row: [R, 1] on the device of `like`, and of its dtype if none is given."""
    return torch.tensor([[parameter(state)] for state in states], dtype=dtype or like.dtype, device=like.device)
