"""What sampling keeps of each sequence between steps: parameters, position, and token counts for the penalties.

The engine thread makes one `SamplingState` for each choice of a request and appends every token to it. All is numpy and
plain Python, independent of the vocabulary's size; `engine.sampling` turns it into tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from baton.errors import BatonError
from baton.requests import FinishReason, RequestSpec, SamplingParams
from engine.grammar import CompiledGrammar, Guide

# Below this, dividing logits by the temperature would overflow; vLLM draws the line to greedy at the same value.
GREEDY_TEMPERATURE = 1e-5

Ids = npt.NDArray[np.int64]
Values = npt.NDArray[np.float32]
Uniforms = npt.NDArray[np.float64]


class TokenCounts:
    """How often each token occurs in the output of a sequence, for tokens of its prompt or output only."""

    def __init__(self, prompt_token_ids: Sequence[int]) -> None:
        distinct = np.unique(np.asarray(prompt_token_ids, np.int64))
        self._index = {token_id: index for index, token_id in enumerate(distinct.tolist())}
        self._ids = distinct
        self._counts = np.zeros(len(distinct), np.float32)

    @property
    def token_ids(self) -> Ids:
        """Each token once: int64 [n]."""
        return self._ids[: len(self._index)]

    @property
    def counts(self) -> Values:
        """Occurrences in the output, 0 for those of the prompt alone: float32 [n]."""
        return self._counts[: len(self._index)]

    def add(self, token_id: int) -> None:
        """Counts one more token of the output. Amortised O(1)."""
        index = self._index.setdefault(token_id, len(self._index))
        if index == len(self._ids):
            capacity = max(16, 2 * index)
            self._ids = np.resize(self._ids, capacity)
            self._counts = np.concatenate([self._counts, np.zeros(capacity - index, np.float32)])
        self._ids[index] = token_id
        self._counts[index] += 1


class SamplingState:
    """What sampling knows of one choice of a request: its parameters and the tokens so far.

    The caller appends every token of the choice, those sampled here and those forced alike.

    Attributes:
        choice: index of the choice, which draws random numbers of its own.
        position: tokens appended so far.
        num_pending: tokens that were chosen since, and that nobody has been told yet.
        seed: 64 bits of the request's.
        greedy: whether the most likely token is taken.
        counts: tokens for the penalties; None without any.
        bias: token ids and what is added to their logits; None without any.
        endings: ids of the tokens that end the choice.
        guide: where the choice stands in its grammar; None without one.
    """

    __slots__ = (
        "_always_edited",
        "_masked_until",
        "bias",
        "choice",
        "counts",
        "endings",
        "greedy",
        "guide",
        "num_pending",
        "params",
        "position",
        "seed",
    )

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        *,
        choice: int = 0,
        grammar: CompiledGrammar | None = None,
    ) -> None:
        assert grammar is not None or params.grammar is None, "a grammar that nobody compiled"
        self.params = params
        self.choice = choice
        self.position = 0
        self.num_pending = 0
        self.seed = params.seed & (2**64 - 1)
        self.greedy = params.temperature < GREEDY_TEMPERATURE
        self.endings: Ids = np.array(sorted(params.ending_token_ids), np.int64)
        self.bias: tuple[Ids, Values] | None = None
        if params.logit_bias:
            ids = np.array(list(params.logit_bias.keys()), np.int64)
            self.bias = ids, np.array(list(params.logit_bias.values()), np.float32)
        repeats = params.repetition_penalty != 1.0
        penalised = repeats or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        # Only the repetition penalty looks at the prompt.
        self.counts = TokenCounts(prompt_token_ids if repeats else ()) if penalised else None
        self.guide: Guide | None = None if grammar is None else grammar.guide(params)
        self._always_edited = self.bias is not None or penalised or self.guide is not None
        # A grammar decides itself when it may end.
        self._masked_until = params.min_tokens if len(self.endings) and self.guide is None else 0

    @property
    def next_position(self) -> int:
        """The position of the token that is chosen next."""
        return self.position + self.num_pending

    @property
    def looks_back(self) -> bool:
        """Whether the next token cannot be chosen before those chosen so far are appended."""
        return self.counts is not None or self.guide is not None

    @property
    def masks_endings(self) -> bool:
        """Whether the next token must not end the choice."""
        return self.next_position < self._masked_until

    @property
    def is_edited(self) -> bool:
        """Whether the next token is not chosen from the logits as they are."""
        return self._always_edited or self.masks_endings

    def append(self, token_id: int) -> None:
        """Takes note of the next token of the choice."""
        self.position += 1
        if self.counts is not None:
            self.counts.add(token_id)
        if self.guide is not None:
            self.guide.append(token_id)

    def extend(self, token_ids: Iterable[int]) -> None:
        """Takes note of several tokens in order."""
        for token_id in token_ids:
            self.append(token_id)

    def finish_reason(self, token_id: int) -> FinishReason:
        """Whether `token_id`, the token appended last, ends the choice."""
        reason = self.params.finish_reason(token_id, self.position)
        if reason is not FinishReason.STOP and self.guide is not None and self.guide.is_over:
            return FinishReason.STOP
        return reason

    @property
    def error(self) -> BatonError | None:
        """Why this choice cannot go on; None while it can."""
        return None if self.guide is None else self.guide.error


def states_after_prefix(spec: RequestSpec, grammar: CompiledGrammar | None = None) -> list[SamplingState]:
    """How to sample the token after `spec.shared_token_ids`, for each choice where it is not forced.

    Args:
        grammar: `spec.sampling.grammar`, compiled.
    """
    states = []
    for choice in spec.sampled_choices:
        state = SamplingState(spec.sampling, spec.prompt_token_ids, choice=choice, grammar=grammar)
        state.extend(spec.shared_token_ids[len(spec.prompt_token_ids) :])
        states.append(state)
    return states
