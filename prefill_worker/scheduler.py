"""Which prompts are computed in the next step, and how much of each: pure decisions, no torch, clock or I/O.

A step has a budget of tokens. Prompts are ordered by priority with ageing (waiting for `ageing_s` is worth one level),
then by arrival; the first takes as much of the budget as it needs, so a long prompt goes in chunks and several short
ones share a step. A prompt is admitted only with blocks for all of it, so admitted prompts always finish (no partial
holders that wait for each other). Chunking follows Sarathi-Serve (Agrawal et al., OSDI 2024).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from baton.requests import AttemptRef


@dataclasses.dataclass(slots=True, eq=False)
class Prompt:
    """What the scheduler knows of one prompt; the loop keeps it current.

    Attributes:
        num_tokens: tokens to compute and send, cached ones included.
        num_computed: leading tokens whose KV is in the pool.
        arrived_s: arrival on the loop's clock.
        admitted: whether it holds its blocks.
        scored: every token of it needs logits, which take far more memory than the rest of a step.
    """

    ref: AttemptRef
    priority: int
    arrived_s: float
    num_tokens: int
    num_computed: int = 0
    admitted: bool = False
    scored: bool = False

    @property
    def num_remaining(self) -> int:
        return self.num_tokens - self.num_computed


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """Compute the next `num_tokens` tokens of a prompt."""

    prompt: Prompt
    num_tokens: int


def in_order(prompts: Iterable[Prompt], *, now_s: float, ageing_s: float) -> list[Prompt]:
    """Most urgent first: the lowest of priority - waited / ageing_s, then the earliest."""
    return sorted(prompts, key=lambda p: (p.priority - (now_s - p.arrived_s) / ageing_s, p.arrived_s, p.ref.request_id))


def admit(
    ordered: Sequence[Prompt],
    *,
    free_blocks: int,
    max_requests: int,
    blocks_needed: Callable[[Prompt], int | None],
) -> list[Prompt]:
    """The waiting prompts to admit now.

    The first that does not fit ends admission: were smaller ones let past it, it might never fit.

    Args:
        ordered: all prompts, most urgent first.
        free_blocks: blocks that may be given out.
        max_requests: most prompts that hold blocks at once.
        blocks_needed: blocks that a prompt takes out of the free pool; None where it should wait for another prompt
            that is computing the prefix that they share.
    """
    num_admitted = sum(prompt.admitted for prompt in ordered)
    admitted: list[Prompt] = []
    for prompt in ordered:
        if prompt.admitted:
            continue
        if num_admitted + len(admitted) >= max_requests:
            break
        needed = blocks_needed(prompt)
        if needed is None:
            continue
        if needed > free_blocks:
            break
        free_blocks -= needed
        admitted.append(prompt)
    return admitted


def plan_chunks(
    ordered: Iterable[Prompt], *, max_tokens: int, max_requests: int, max_scored_tokens: int
) -> list[Chunk]:
    """The chunks of one step: at most `max_tokens` tokens of at most `max_requests` admitted prompts, most urgent
    first; of scored prompts at most `max_scored_tokens`."""
    chunks: list[Chunk] = []
    for prompt in ordered:
        if max_tokens == 0 or len(chunks) == max_requests:
            break
        if prompt.admitted and prompt.num_remaining:
            num_tokens = min(prompt.num_remaining, max_tokens)
            if prompt.scored:
                num_tokens = min(num_tokens, max_scored_tokens)
                max_scored_tokens -= num_tokens
            max_tokens -= num_tokens
            if num_tokens:
                chunks.append(Chunk(prompt, num_tokens))
    return chunks
