"""Chooses tokens with torch alone, on any device: what the kernels for CPUs and GPUs are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from engine.choosing_cpu import numbers_for
from engine.sampling_state import SamplingState, Uniforms

# Candidates that are ranked where top-p alone limits them; a nucleus of more is found without ranking.
_NUCLEUS_CANDIDATES = 128


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """As `engine.choosing_cpu.argmax`."""
    return logits.argmax(-1)


def choose(logits: torch.Tensor, rows: Sequence[int], states: Sequence[SamplingState]) -> torch.Tensor:
    """As `engine.choosing_cpu.choose`."""
    numbers = numbers_for(states)
    token_ids = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    places: dict[_Method, list[int]] = {}
    for place, state in enumerate(states):
        places.setdefault(_method(state), []).append(place)
    for method, of_method in places.items():
        chosen = logits[[rows[place] for place in of_method]]
        token_ids[of_method] = method(chosen, [states[place] for place in of_method], numbers[of_method])
    return token_ids


def ranked(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `engine.choosing_cpu.ranked`."""
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


_Method = Callable[[torch.Tensor, Sequence[SamplingState], Uniforms], torch.Tensor]


def _method(state: SamplingState) -> _Method:
    """The function that chooses a row's token: token ids [R] from logits [R, V], which it may overwrite."""
    if state.greedy:
        return _argmax
    return _draw_ranked if state.params.top_k > 0 or state.params.top_p < 1.0 else _draw


def _argmax(logits: torch.Tensor, states: Sequence[SamplingState], numbers: Uniforms) -> torch.Tensor:
    """The most likely token of each row: the lowest id among equals."""
    return logits.argmax(-1)


def _draw(logits: torch.Tensor, states: Sequence[SamplingState], numbers: Uniforms) -> torch.Tensor:
    """Draws from the whole vocabulary, but for what min-p excludes."""
    logits /= _column(states, lambda state: state.params.temperature, logits)
    weights = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    if any(state.params.min_p > 0 for state in states):
        weights *= weights >= _column(states, lambda state: state.params.min_p, weights)
    # Converting first is seven times as fast as cumsum(dtype=float64) on a CPU.
    return _invert(weights.double().cumsum_(-1), numbers)


def _draw_ranked(logits: torch.Tensor, states: Sequence[SamplingState], numbers: Uniforms) -> torch.Tensor:
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
    drawn = _invert(weights.gather(-1, order).cumsum_(-1), numbers)
    token_ids = ids.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
    covered = (cumulative[:, -1] >= mass[:, 0]).tolist() if unlimited else []
    large = [row for row in unlimited if not covered[row]]
    if large:
        token_ids[large] = _draw_nucleus(logits[large], [states[row] for row in large], numbers[large])
    return token_ids


def _draw_nucleus(scaled: torch.Tensor, states: Sequence[SamplingState], numbers: Uniforms) -> torch.Tensor:
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
    return _invert(weights.double().cumsum_(-1), numbers)


def _sum(weights: torch.Tensor) -> torch.Tensor:
    """Sum of each row: float64 [R, 1]."""
    return weights.sum(-1, keepdim=True, dtype=torch.float64)


def _invert(cdf: torch.Tensor, numbers: Uniforms) -> torch.Tensor:
    """The first entry [R] of each row of `cdf` that exceeds the row's random number.

    Args:
        cdf: float64 [R, n], cumulative and not normalised.
    """
    targets = torch.from_numpy(numbers).to(cdf.device).unsqueeze(-1) * cdf[:, -1:]
    index = torch.searchsorted(cdf, targets, right=True).squeeze(-1)
    # NaN logits exceed nothing; one broken row must not index beyond the vocabulary and take the batch with it.
    return index.clamp_(max=cdf.shape[1] - 1)


def _column(
    states: Sequence[SamplingState],
    parameter: Callable[[SamplingState], float],
    like: torch.Tensor,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """A parameter of each row: [R, 1] on the device of `like`, and of its dtype if none is given."""
    return torch.tensor([[parameter(state)] for state in states], dtype=dtype or like.dtype, device=like.device)
