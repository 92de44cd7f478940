"""Sampling equals a slow and plain definition of every step, and depends on nothing but its own row."""

import collections
import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.requests import SamplingParams
from engine import choosing_cpu
from engine.philox import uniforms
from engine.sampling import SamplingState, ranked, sample
from tests.engine import choosing_torch


@pytest.fixture(scope="module", autouse=True, params=[choosing_cpu, choosing_torch], ids=["cpu", "torch"])
def chooser(request):
    """All that is said here holds for the kernels and for torch alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.sampling._chooser", lambda device: request.param)
        yield


DEFAULT = SamplingParams(max_tokens=10_000, temperature=1.0, seed=1234)


def state_of(params, prompt=(0,), output=(), choice=0):
    state = SamplingState(params, prompt, choice=choice)
    for token_id in output:
        state.append(token_id)
    return state


def random_logits(*shape, seed=0, step=None):
    """Normal logits; multiples of `step` if given, so that many are equal."""
    logits = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3
    return logits if step is None else (logits / step).round() * step


def eighths(smallest, largest):
    """Numbers whose sums are exact in float32, so that what is equal in float64 is equal there, and the reverse."""
    return st.integers(smallest, largest).map(lambda number: number / 8)


# The definition, one row and one token at a time, in float64.


def reference_edits(logits, params, prompt, output):
    logits = [float(logit) for logit in logits]
    for token_id, bias in params.logit_bias.items():
        if token_id < len(logits):
            logits[token_id] += bias
    if len(output) < params.min_tokens:
        for token_id in params.ending_token_ids:
            logits[token_id] = -math.inf
    for token_id in {*prompt, *output}:
        logit = logits[token_id]
        logits[token_id] = logit / params.repetition_penalty if logit > 0 else logit * params.repetition_penalty
    for token_id, count in collections.Counter(output).items():
        logits[token_id] -= params.frequency_penalty * count + params.presence_penalty
    return logits


def reference_weights(logits, params):
    """Unnormalised probabilities by token id, of the tokens that the filters keep."""
    scaled = [logit / params.temperature for logit in logits]
    order = sorted(range(len(scaled)), key=lambda token_id: (-scaled[token_id], token_id))
    if params.top_k:
        order = order[: params.top_k]
    weights = {token_id: math.exp(scaled[token_id] - scaled[order[0]]) for token_id in order}
    if params.top_p < 1:
        total, before, nucleus = sum(weights.values()), 0.0, []
        for token_id in order:
            if before >= params.top_p * total:
                break
            nucleus.append(token_id)
            before += weights[token_id]
        order = nucleus
    return {token_id: weights[token_id] for token_id in sorted(order) if weights[token_id] >= params.min_p}


def reference_token(logits, params, prompt=(0,), output=(), choice=0):
    edited = reference_edits(logits, params, prompt, output)
    if params.temperature < 1e-5:
        return max(range(len(edited)), key=lambda token_id: (edited[token_id], -token_id))
    weights = reference_weights(edited, params)
    words = (np.array([word], np.uint64) for word in (params.seed % 2**64, choice, len(output)))
    target, cumulative = uniforms(*words)[0] * sum(weights.values()), 0.0
    for token_id, weight in weights.items():
        cumulative += weight
        if cumulative > target:
            return token_id
    raise AssertionError("the random number is below 1")


def drawn(logits, params, num_positions):
    """Tokens of one row of logits at positions 0, 1, ... of a choice."""
    states = []
    for position in range(num_positions):
        states.append(SamplingState(params, (0,)))
        states[-1].position = position
    return sample(logits.expand(num_positions, -1), states).token_ids


class TestGreedy:
    def test_it_takes_the_best_token(self):
        logits = random_logits(7, 50)
        states = [state_of(dataclasses.replace(DEFAULT, temperature=0.0)) for _ in range(7)]
        assert sample(logits, states).token_ids == [int(row.argmax()) for row in logits]

    @pytest.mark.parametrize("changes", [{}, {"logit_bias": {0: -1.0}}])
    def test_among_equals_it_takes_the_lowest_id(self, changes):
        logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 2.0]])
        state = state_of(dataclasses.replace(DEFAULT, temperature=0.0, **changes))
        assert sample(logits, [state]).token_ids == [1]

    def test_a_tiny_temperature_is_greedy_and_a_small_one_nearly(self):
        logits = torch.tensor([[1.0, 1.001, 0.0]])
        for temperature in (1e-6, 2e-5):
            assert drawn(logits[0], dataclasses.replace(DEFAULT, temperature=temperature), 20) == [1] * 20

    def test_no_rows_give_no_tokens(self):
        assert sample(torch.empty(0, 5), []).token_ids == []


class TestFilters:
    """Every filter alone and all together draw what the definition draws, position by position."""

    @pytest.mark.parametrize("step", [None, 1.0], ids=["distinct", "tied"])
    @pytest.mark.parametrize("vocabulary", [12, 700])
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"temperature": 0.3},
            {"temperature": 5.0},
            {"top_k": 1},
            {"top_k": 5},
            {"top_k": 10_000},
            {"top_p": 0.3},
            {"top_p": 0.9},
            {"top_p": 0.999, "temperature": 50.0},  # nearly flat: the nucleus is larger than what is ranked
            {"top_p": 0.5, "temperature": 50.0, "min_p": 0.9},
            {"top_p": 1 - 1e-16, "temperature": 50.0},
            {"top_p": 1e-9},
            {"min_p": 0.2},
            {"min_p": 1.0},
            {"top_k": 8, "top_p": 0.7, "min_p": 0.05, "temperature": 1.5},
            {"top_k": 600, "top_p": 0.95, "temperature": 3.0},
            {"top_p": 0.8, "min_p": 0.1},
        ],
        ids=str,
    )
    def test_draws_equal_the_definition(self, changes, vocabulary, step):
        logits = random_logits(vocabulary, seed=3, step=step)
        params = dataclasses.replace(DEFAULT, **changes)
        scaled_reference = [
            reference_token(logits, params, prompt=(), output=(0,) * position) for position in range(60)
        ]
        assert drawn(logits, params, 60) == scaled_reference

    def test_top_k_breaks_ties_by_id(self):
        logits = torch.tensor([0.0, 1.0, 1.0, 1.0, 2.0])
        assert set(drawn(logits, dataclasses.replace(DEFAULT, top_k=3), 200)) == {1, 2, 4}

    def test_top_p_keeps_the_token_that_reaches_the_mass_and_no_more(self):
        logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
        for top_p, kept in ((0.4, {0}), (0.5, {0}), (0.51, {0, 1}), (0.75, {0, 1}), (0.8, {0, 1, 2})):
            assert set(drawn(logits, dataclasses.replace(DEFAULT, top_p=top_p), 300)) == kept, top_p

    @pytest.mark.parametrize("top_p", [0.5, 0.75, 0.7501])
    def test_a_large_nucleus_of_equals_is_cut_by_id(self, top_p):
        token_ids = drawn(torch.zeros(400), dataclasses.replace(DEFAULT, top_p=top_p), 4000)
        assert max(token_ids) == math.ceil(400 * top_p) - 1

    def test_top_p_of_zero_leaves_the_best_token(self):
        logits = random_logits(20)
        assert set(drawn(logits, dataclasses.replace(DEFAULT, top_p=0.0), 50)) == {int(logits.argmax())}

    def test_min_p_is_relative_to_the_best_token(self):
        logits = torch.tensor([0.5, 0.26, 0.14, 0.1]).log()
        assert set(drawn(logits, dataclasses.replace(DEFAULT, min_p=0.5), 300)) == {0, 1}

    @settings(max_examples=120, deadline=None)
    @given(
        logits=st.lists(eighths(-48, 48), min_size=2, max_size=30),
        temperature=st.floats(0.2, 3.0),
        top_k=st.integers(0, 12),
        top_p=st.floats(0.05, 1.0),
        min_p=st.floats(0.0, 0.5),
        seed=st.integers(0, 2**64 - 1),
        choice=st.integers(0, 15),
        output=st.lists(st.integers(0, 1), max_size=5),
        penalties=st.tuples(eighths(-8, 8), eighths(-8, 8), eighths(4, 16)),
    )
    def test_any_combination_equals_the_definition(
        self, logits, temperature, top_k, top_p, min_p, seed, choice, output, penalties
    ):
        presence, frequency, repetition = penalties
        params = SamplingParams(
            max_tokens=99,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            presence_penalty=presence,
            frequency_penalty=frequency,
            repetition_penalty=repetition,
            logit_bias={0: 0.375, 500: 1.0},
            min_tokens=2,
            stop_token_ids=(1,),
        )
        state = state_of(params, prompt=(0, 1), output=output, choice=choice)
        token_ids = sample(torch.tensor([logits]), [state]).token_ids
        assert token_ids == [reference_token(logits, params, (0, 1), output, choice)]


class TestEdits:
    """Seen through greedy rows: the best token after the edit."""

    @staticmethod
    def best(logits, prompt=(0,), output=(), **changes):
        params = dataclasses.replace(DEFAULT, temperature=0.0, **changes)
        return sample(torch.tensor([logits]), [state_of(params, prompt, output)]).token_ids[0]

    def test_bias_is_added(self):
        assert self.best([1.0, 0.0, 0.5], logit_bias={2: 0.6}) == 2
        assert self.best([1.0, 0.0, 0.5], logit_bias={0: -100.0}) == 2

    def test_ids_beyond_the_vocabulary_are_ignored(self):
        assert self.best([1.0, 2.0], logit_bias={7: 100.0}) == 1
        assert self.best([1.0, 2.0], min_tokens=1, stop_token_ids=(1, 7)) == 0

    def test_tokens_that_end_wait_for_min_tokens(self):
        changes = {"min_tokens": 2, "eos_token_ids": (1,), "stop_token_ids": (2,)}
        assert self.best([0.0, 3.0, 2.0], output=(0,), **changes) == 0
        assert self.best([0.0, 3.0, 2.0], output=(0, 0), **changes) == 1

    def test_presence_counts_once_and_frequency_each_time(self):
        assert self.best([1.0, 0.8], output=(0, 0), presence_penalty=0.15) == 0
        assert self.best([1.0, 0.8], output=(0, 0), frequency_penalty=0.15) == 1

    def test_presence_and_frequency_do_not_look_at_the_prompt(self):
        assert self.best([1.0, 0.8], prompt=(0, 0), presence_penalty=1.0, frequency_penalty=1.0) == 0

    def test_repetition_looks_at_prompt_and_output_and_lowers_both_signs(self):
        assert self.best([1.0, 0.8], prompt=(0,), repetition_penalty=2.0) == 1
        assert self.best([1.0, 0.8], prompt=(1,), output=(0,), repetition_penalty=2.0) == 0
        assert self.best([-1.0, -1.5], prompt=(0,), repetition_penalty=2.0) == 1

    def test_only_rows_that_ask_are_edited(self):
        logits = torch.tensor([[1.0, 0.9]]).repeat(3, 1)
        plain = dataclasses.replace(DEFAULT, temperature=0.0)
        states = [state_of(plain), state_of(dataclasses.replace(plain, logit_bias={1: 1.0})), state_of(plain)]
        assert sample(logits, states).token_ids == [0, 1, 0]

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_the_logits_are_left_as_they_are(self, temperature):
        logits = random_logits(2, 20)
        before = logits.clone()
        params = dataclasses.replace(
            DEFAULT, temperature=temperature, logit_bias={1: 1.0}, repetition_penalty=2.0, logprobs=2
        )
        sample(logits, [state_of(params), state_of(dataclasses.replace(params, top_k=3))])
        assert torch.equal(logits, before)


class TestRandomness:
    @pytest.mark.parametrize("changes", [{}, {"top_k": 8}, {"top_p": 0.999999}], ids=str)
    def test_frequencies_follow_the_distribution(self, changes):
        logits = random_logits(8, seed=5) / 3
        expected = logits.double().softmax(-1).numpy() * 20_000
        token_ids = drawn(logits, dataclasses.replace(DEFAULT, **changes), 20_000)
        counts = np.bincount(token_ids, minlength=8)
        assert ((counts - expected) ** 2 / expected).sum() < 29.9  # the 0.9999 quantile for 7 degrees of freedom

    def test_seeds_choices_and_positions_draw_independently(self):
        logits = torch.zeros(4096, 4)
        base = [state_of(DEFAULT, output=(0,) * position) for position in range(64)]

        def tokens(seed, choice):
            states = [state_of(dataclasses.replace(DEFAULT, seed=seed), choice=choice) for _ in base]
            for position, state in enumerate(states):
                state.position = position
            return sample(logits[: len(states)], states).token_ids

        sequences = [tokens(seed, choice) for seed in range(4) for choice in range(4)]
        agreements = [
            sum(map(int.__eq__, one, other)) for i, one in enumerate(sequences) for other in sequences[i + 1 :]
        ]
        # One in four by chance; 120 pairs of 64 tokens.
        assert 0.23 < np.mean(agreements) / 64 < 0.27
        assert max(agreements) < 36

    def test_a_replay_with_forced_tokens_draws_on_as_before(self):
        logits = random_logits(12, 30, seed=2)
        first = state_of(DEFAULT)
        stream = []
        for row in logits:
            stream += sample(row[None], [first]).token_ids
            first.append(stream[-1])
        replay = state_of(DEFAULT, output=stream[:7])
        for position in range(7, 12):
            assert sample(logits[position][None], [replay]).token_ids == [stream[position]]
            replay.append(stream[position])

    @pytest.mark.parametrize("changes", [{}, {"top_k": 6}], ids=str)
    @pytest.mark.parametrize(("number", "token_id"), [(0.0, 1), (1 - 2.0**-53, 4)])
    def test_the_ends_of_the_range_draw_tokens_that_are_possible(self, monkeypatch, changes, number, token_id):
        monkeypatch.setattr(
            "engine.choosing_cpu.uniforms", lambda seeds, streams, positions: np.full(len(seeds), number)
        )
        state = state_of(dataclasses.replace(DEFAULT, min_tokens=1, stop_token_ids=(0, 5), **changes))
        assert sample(random_logits(1, 6), [state]).token_ids == [token_id]

    def test_negative_and_huge_seeds_are_taken_modulo_64_bits(self):
        logits = random_logits(30)
        for seed in (-1, 2**64 - 1, 2**65 - 1):
            assert drawn(logits, dataclasses.replace(DEFAULT, seed=seed), 10) == drawn(
                logits, dataclasses.replace(DEFAULT, seed=2**64 - 1), 10
            )


def mixed_rows(num_rows, vocabulary):
    """Logits and states of rows that use everything in turn."""
    variants = [
        {"temperature": 0.0},
        {},
        {"top_k": 4},
        {"top_p": 0.8, "logprobs": 3},
        {"min_p": 0.1, "presence_penalty": 0.5},
        {"top_k": 300, "top_p": 0.9, "temperature": 4.0},
        {"temperature": 0.0, "repetition_penalty": 1.3, "logprobs": 0},
        {"top_p": 0.9999, "temperature": 30.0},
        {"logit_bias": {3: 4.0}, "min_tokens": 9, "eos_token_ids": (2,)},
    ]
    logits = random_logits(num_rows, vocabulary, seed=11, step=0.125)
    states = []
    for row in range(num_rows):
        params = dataclasses.replace(DEFAULT, seed=row, **variants[row % len(variants)])
        output = [(row * 7 + index) % vocabulary for index in range(row % 5)]
        states.append(state_of(params, (1, 2, 3), output, choice=row % 3))
    return logits, states


class TestBatchIndependence:
    def test_a_row_draws_the_same_alone_and_in_any_company(self):
        logits, states = mixed_rows(36, 900)
        together = sample(logits, states)
        alone = [sample(logits[row : row + 1], states[row : row + 1]) for row in range(len(states))]
        assert [result.token_ids[0] for result in alone] == together.token_ids
        assert [result.logprobs[0] for result in alone] == together.logprobs

    def test_the_order_of_rows_does_not_matter(self):
        logits, states = mixed_rows(36, 900)
        together = sample(logits, states)
        order = np.random.default_rng(0).permutation(len(states)).tolist()
        permuted = sample(logits[order], [states[row] for row in order])
        assert permuted.token_ids == [together.token_ids[row] for row in order]
        assert permuted.logprobs == [together.logprobs[row] for row in order]

    def test_one_row_of_nan_harms_no_other(self):
        logits, states = mixed_rows(9, 900)
        together = sample(logits, states)
        for broken in range(9):
            damaged = logits.clone()
            damaged[broken] = torch.nan
            token_ids = sample(damaged, states).token_ids
            assert 0 <= token_ids[broken] < 900
            del token_ids[broken]
            assert token_ids == [token_id for row, token_id in enumerate(together.token_ids) if row != broken]


class TestLogprobs:
    def test_they_are_those_of_the_models_own_distribution(self):
        logits = random_logits(3, 40)
        edited = {"temperature": 0.5, "top_k": 2, "logit_bias": {9: 50.0}, "repetition_penalty": 1.5}
        states = [state_of(dataclasses.replace(DEFAULT, logprobs=count, **edited)) for count in (0, 1, 5)]
        result = sample(logits, states)
        expected = logits.log_softmax(-1)
        assert result.token_ids == [9, 9, 9]
        for row, count in enumerate((0, 1, 5)):
            logprobs = result.logprobs[row]
            assert logprobs.sampled == pytest.approx(float(expected[row, 9]), abs=1e-5)
            values, ids = expected[row].topk(count)
            assert [token_id for token_id, _ in logprobs.top] == ids.tolist()
            assert [value for _, value in logprobs.top] == pytest.approx(values.tolist(), abs=1e-5)

    def test_rows_that_did_not_ask_get_none(self):
        states = [state_of(DEFAULT), state_of(dataclasses.replace(DEFAULT, temperature=0.0, logprobs=0))]
        result = sample(random_logits(2, 10), states)
        assert result.logprobs[0] is None
        assert result.logprobs[1].top == ()

    def test_more_than_the_vocabulary_gives_all_of_it(self):
        result = sample(random_logits(1, 4), [state_of(dataclasses.replace(DEFAULT, logprobs=9))])
        assert len(result.logprobs[0].top) == 4


@given(
    rows=st.integers(1, 4).flatmap(
        lambda width: st.lists(
            st.lists(st.integers(-3, 3), min_size=4 * width, max_size=4 * width), min_size=1, max_size=4
        )
    ),
    k=st.integers(1, 16),
)
def test_ranking_is_by_value_then_by_id(rows, k):
    logits = torch.tensor(rows, dtype=torch.float32)
    k = min(k, logits.shape[1])
    values, ids = ranked(logits, k)
    for row, row_values, row_ids in zip(rows, values.tolist(), ids.tolist(), strict=True):
        expected = sorted(range(len(row)), key=lambda token_id: (-row[token_id], token_id))[:k]
        assert row_ids == expected
        assert row_values == [row[token_id] for token_id in expected]
