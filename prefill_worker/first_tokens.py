"""The first token of every choice of prompts that are computed. Called by the prefill loop on the engine thread."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from baton.errors import BatonError
from baton.requests import Token
from engine.sampling import sample
from engine.sampling_state import SamplingState, states_after_prefix
from prefill_worker.request import PrefillRequest


def sample_first_tokens(requests: Sequence[PrefillRequest], logits: torch.Tensor) -> list[list[Token] | BatonError]:
    """For each request the tokens of the choices whose token is not forced, or why it cannot go on.

    Args:
        logits: float32 [len(requests), vocabulary], of each prompt's last position.
    """
    states: list[SamplingState] = []
    rows: list[int] = []
    for row, request in enumerate(requests):
        of_request = states_after_prefix(request.spec, request.grammar)
        states += of_request
        rows += [row] * len(of_request)
    result = sample(logits[rows], states)
    tokens: list[list[Token]] = [[] for _ in requests]
    errors: dict[int, BatonError] = {}
    for row, state, token_id, logprobs in zip(rows, states, result.token_ids, result.logprobs, strict=True):
        spec = requests[row].spec
        state.append(token_id)
        if state.error is not None:
            errors[row] = state.error
        reason = state.finish_reason(token_id)
        tokens[row].append(Token(spec.ref, state.choice, spec.first_position, token_id, logprobs, reason))
    return [errors.get(row) or of_request for row, of_request in enumerate(tokens)]
