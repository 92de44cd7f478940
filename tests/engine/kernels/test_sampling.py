"""The kernel draws the tokens that torch alone draws, from the same logits and random numbers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.requests import SamplingParams
from engine import choosing_gpu
from engine.sampling_state import SamplingState
from tests.engine import choosing_torch
from tests.engine.kernels.interpreter import DEVICE

Params = functools.partial(SamplingParams, max_tokens=100)
# More than a tile of the search, and not a multiple of it.
VOCABULARY = 530


def make_states(params: Sequence[SamplingParams], first_seed: int) -> list[SamplingState]:
    states = []
    for row, each in enumerate(params):
        state = SamplingState(dataclasses.replace(each, seed=first_seed + row), [], choice=row)
        state.position = 7 * row
        states.append(state)
    return states


def chosen(logits: torch.Tensor, states: Sequence[SamplingState]) -> list[int]:
    return choosing_gpu.choose(logits.to(DEVICE), range(len(states)), states).tolist()


def expected(logits: torch.Tensor, states: Sequence[SamplingState]) -> list[int]:
    return choosing_torch.choose(logits, range(len(states)), states).tolist()


def random_logits(rows: int, vocabulary: int = VOCABULARY, seed: int = 0) -> torch.Tensor:
    """With many equal ones, as bfloat16 models make them."""
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(rows, vocabulary, generator=generator)).bfloat16().float()


MIXED = (
    Params(temperature=0.0),
    Params(temperature=0.7),
    Params(temperature=1.3, top_k=5),
    Params(temperature=1.0, top_p=0.6),
    Params(temperature=0.9, top_k=40, top_p=0.8, min_p=0.05),
    Params(temperature=2.0, top_p=0.99),
    Params(temperature=1.0, min_p=0.3),
    Params(temperature=1.0, top_k=5000, top_p=1e-9),
)


def test_a_batch_of_all_kinds() -> None:
    states = make_states(MIXED, 2**62)
    logits = random_logits(len(states))
    assert chosen(logits, states) == expected(logits, states)


@st.composite
def params(draw: st.DrawFn) -> SamplingParams:
    return Params(
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 4.0])),
        top_k=draw(st.sampled_from([0, 1, 3, 30, 200])),
        top_p=draw(st.sampled_from([1.0, 0.9, 0.5, 0.05])),
        min_p=draw(st.sampled_from([0.0, 0.125])),
    )


@settings(max_examples=6, deadline=None, derandomize=True)
@given(each=params(), seed=st.integers(0, 2**63 - 1), vocabulary=st.integers(2, 40))
def test_any_parameters(each: SamplingParams, seed: int, vocabulary: int) -> None:
    states = make_states([each], seed)
    logits = random_logits(1, vocabulary, seed % 1000)
    logits[0, 1:] += logits[0, 1:].abs() * torch.tensor(-float(seed % 2))
    assert chosen(logits, states) == expected(logits, states)


def test_what_a_grammar_excludes_is_never_drawn() -> None:
    logits = torch.full((3, 50), -torch.inf)
    logits[:, [11, 30]] = torch.tensor([1.0, 1.0])
    states = make_states([Params(temperature=1.0), Params(temperature=1.0, top_k=20), Params(temperature=0.0)], 5)
    token_ids = chosen(logits, states)
    assert set(token_ids) <= {11, 30}
    assert token_ids[2] == 11
    assert token_ids == expected(logits, states)


def test_of_equal_logits_the_lowest_ids_are_kept() -> None:
    """Zero equals minus zero."""
    logits = torch.zeros(6, 20)
    logits[:, ::2] = -0.0
    params = [Params(temperature=1.0, top_k=2)] * 3 + [Params(temperature=1.0, top_p=0.1)] * 3
    assert set(chosen(logits, make_states(params, 0))) == {0, 1}


def test_a_token_depends_on_its_row_alone() -> None:
    states = make_states(MIXED[2:4], 99)
    logits = random_logits(len(states), 60)
    assert [chosen(logits[row : row + 1], states[row : row + 1])[0] for row in range(2)] == chosen(logits, states)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_broken_logits_stay_within_the_vocabulary() -> None:
    logits = torch.full((2, 30), torch.nan)
    for token_id in chosen(logits, make_states([Params(temperature=0.0), Params(temperature=1.0, top_p=0.5)], 0)):
        assert 0 <= token_id < 30


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.lists(st.sampled_from([0.0, -0.0, 1.5, -1.5, 3e38, -3e38, -torch.inf]), min_size=9, max_size=9)),
    k=st.integers(1, 9),
)
def test_ranking_is_by_value_then_by_id(rows: list[list[float]], k: int) -> None:
    logits = torch.tensor(rows, device=DEVICE).reshape(-1, 9)
    values, ids = choosing_gpu.ranked(logits, k)
    for row, row_values, row_ids in zip(rows, values.tolist(), ids.tolist(), strict=True):
        assert row_ids == sorted(range(9), key=lambda token_id: (-row[token_id], token_id))[:k]
        # 3e38 is no float32.
        assert row_values == torch.tensor(row)[row_ids].tolist()
