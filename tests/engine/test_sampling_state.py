"""A sampling state counts what the penalties need and knows when a plain argmax is enough."""

import collections

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.requests import SamplingParams
from engine.sampling_state import SamplingState, TokenCounts

token_lists = st.lists(st.integers(0, 40), max_size=80)


@given(prompt=token_lists, output=token_lists)
def test_counts_are_those_of_the_output_over_the_tokens_of_prompt_and_output(prompt, output):
    counts = TokenCounts(prompt)
    for token_id in output:
        counts.add(token_id)
    occurrences = collections.Counter(output)
    expected = {token_id: occurrences[token_id] for token_id in {*prompt, *output}}
    assert dict(zip(counts.token_ids.tolist(), counts.counts.tolist(), strict=True)) == expected
    assert len(counts.token_ids) == len(expected)


@pytest.mark.parametrize(
    ("changes", "plain"),
    [
        ({}, True),
        ({"temperature": 1e-6}, True),
        ({"top_k": 3, "top_p": 0.5, "min_p": 0.1}, True),  # no filter takes the best token away
        ({"logprobs": 2}, True),
        ({"temperature": 0.7}, False),
        ({"logit_bias": {1: 2.0}}, False),
        ({"presence_penalty": 0.1}, False),
        ({"frequency_penalty": -0.1}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"min_tokens": 2, "eos_token_ids": (1,)}, False),
        ({"min_tokens": 2}, True),  # nothing ends the choice anyway
    ],
)
def test_only_greedy_choices_without_edits_are_plain(changes, plain):
    params = SamplingParams(**{"max_tokens": 9, "temperature": 0.0, **changes})
    state = SamplingState(params, [5])
    assert (state.greedy and not state.is_edited) == plain


def test_endings_are_masked_until_min_tokens_are_there():
    state = SamplingState(SamplingParams(max_tokens=9, temperature=0.0, min_tokens=2, stop_token_ids=(7,)), [5])
    masked = []
    for token_id in (1, 2, 3):
        masked.append(state.masks_endings)
        state.append(token_id)
    assert masked == [True, True, False]
    assert not state.is_edited
    assert state.position == 3
