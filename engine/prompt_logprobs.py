"""Logprobs of a prompt's own tokens, chunk by chunk, as both workers compute them.

The logits at a position say what follows it, so a chunk [start, end) scores the tokens at [start + 1, end + 1):
together all tokens of the prompt but the first, which nothing precedes. Called on the engine thread.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from baton.requests import Logprobs, RequestSpec
from engine.sampling import ranked

# Floats that one pass reads: bounds what is held beside the logits.
MAX_CELLS = 16 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class ScoredTokens:
    """Consecutive tokens of a prompt with their logprobs.

    Attributes:
        start: position of the first of them in the prompt, at least 1.
    """

    start: int
    logprobs: list[Logprobs]


def num_logits(spec: RequestSpec, start: int, end: int) -> int:
    """How many of the last positions of the chunk [start, end) of `spec.shared_token_ids` need logits: all where the
    prompt is scored, else the last of all, from which the next token is sampled."""
    if spec.sampling.prompt_logprobs is not None:
        return end - start
    return int(end == len(spec.shared_token_ids))


def score_chunk(spec: RequestSpec, start: int, logits: torch.Tensor) -> ScoredTokens:
    """The logprobs that the chunk of a prompt from position `start` on gives.

    Of the model's own distribution, as those of sampled tokens.

    Args:
        logits: float32 [n, vocabulary] of the chunk's n positions.
    """
    num_top = spec.sampling.prompt_logprobs
    assert num_top is not None
    token_ids = spec.prompt_token_ids[start + 1 : start + 1 + len(logits)]
    stride = max(1, MAX_CELLS // logits.shape[1])
    logprobs: list[Logprobs] = []
    for first in range(0, len(token_ids), stride):
        some = token_ids[first : first + stride]
        logprobs += _score(logits[first : first + len(some)], some, num_top)
    return ScoredTokens(start + 1, logprobs)


def _score(logits: torch.Tensor, token_ids: Sequence[int], num_top: int) -> list[Logprobs]:
    normaliser = logits.logsumexp(-1, keepdim=True)
    own = torch.tensor(token_ids, device=logits.device).unsqueeze(-1)
    values = (logits.gather(-1, own) - normaliser).squeeze(-1).tolist()
    if not num_top:
        return [Logprobs(value) for value in values]
    top, ids = ranked(logits, min(num_top, logits.shape[1]))
    tops = zip(ids.tolist(), (top - normaliser).tolist(), strict=True)
    return [
        Logprobs(value, tuple(zip(of_ids, of_values, strict=True)))
        for value, (of_ids, of_values) in zip(values, tops, strict=True)
    ]
