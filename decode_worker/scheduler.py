"""What the next decode step computes: pure decisions, no torch, clock or I/O.

Continuous batching (Orca, Yu et al., OSDI 2022): every step takes each running sequence one token further, then spends
a small budget on prompts that this worker prefills itself, so that a prompt never holds a stream up for longer than one
small chunk. A sequence that lacks a block for its next token makes the scheduler ask for a preemption: the request with
the lowest priority, the newest first. The oldest is therefore never preempted, and since any single request fits the
pool alone, it ends.
"""

from __future__ import annotations

import collections.abc
import dataclasses
from typing import Generic, TypeVar

from baton.requests import AttemptRef


@dataclasses.dataclass(slots=True, eq=False)
class Sequence:
    """What the scheduler knows of one sequence of tokens; the loop keeps it current.

    Attributes:
        arrival: order of arrival of the request.
        num_tokens: tokens known so far; when all are computed the next one is sampled.
        num_pending: tokens that were sampled since, which the device knows and nobody else does.
        num_computed: leading tokens whose KV is in the pool.
        num_blocks: logical blocks (per group) that are allocated.
        paused: not to be computed now.
    """

    ref: AttemptRef
    priority: int
    arrival: int
    num_tokens: int
    num_computed: int
    num_blocks: int
    choice: int = 0
    num_pending: int = 0
    paused: bool = False

    @property
    def num_remaining(self) -> int:
        return self.num_tokens + self.num_pending - self.num_computed

    @property
    def order(self) -> tuple[int, int, int]:
        """Sorts the most important first."""
        return (self.priority, self.arrival, self.choice)


S = TypeVar("S", bound=Sequence)


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk(Generic[S]):
    """Compute the next `num_tokens` tokens of a sequence that lacks more than one."""

    sequence: S
    num_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class Plan(Generic[S]):
    """One step's work, or the request to preempt before planning again (then there is none).

    Attributes:
        decodes: sequences that compute their one remaining token.
    """

    decodes: tuple[S, ...] = ()
    chunks: tuple[Chunk[S], ...] = ()
    preempt: AttemptRef | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute."""
        return not self.decodes and not self.chunks


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a step.

    Attributes:
        max_seqs: decodes in one step.
        prefill_tokens: tokens of local prefill in one step.
    """

    max_seqs: int
    prefill_tokens: int
    block_size: int
    num_groups: int


def plan_step(ordered: collections.abc.Sequence[S], free_blocks: int, limits: Limits) -> Plan[S]:
    """Decodes first, then chunks of local prefill with what remains of the blocks and of the budget.

    Of prompts with one priority those whose rest fits the budget come first: a turn of a conversation that lacks a few
    tokens is computed in the next step, whatever backlog of longer prompts this worker has taken.

    Args:
        ordered: by `Sequence.order`.
    """
    decodes: list[S] = []
    prompts: list[S] = []
    for sequence in ordered:
        end = sequence.num_computed + 1
        if (num_tokens := sequence.num_tokens + sequence.num_pending) != end:
            if num_tokens > end:
                prompts.append(sequence)
            continue
        if sequence.paused or len(decodes) == limits.max_seqs:
            continue
        if end > sequence.num_blocks * limits.block_size:
            needed = _new_blocks(sequence, 1, limits)
            if needed > free_blocks:
                if (victim := _victim(ordered)) is not None:
                    return Plan(preempt=victim)
                continue
            free_blocks -= needed
        decodes.append(sequence)
    prompts.sort(key=lambda prompt: (prompt.priority, prompt.num_remaining > limits.prefill_tokens))
    budget = limits.prefill_tokens
    chunks: list[Chunk[S]] = []
    for sequence in prompts:
        if budget == 0:
            break
        num_tokens = _fitting_chunk(sequence, min(sequence.num_remaining, budget), free_blocks, limits)
        if num_tokens:
            free_blocks -= _new_blocks(sequence, num_tokens, limits)
            budget -= num_tokens
            chunks.append(Chunk(sequence, num_tokens))
        elif not decodes and not chunks and (victim := _victim(ordered)) is not None:
            return Plan(preempt=victim)
    return Plan(tuple(decodes), tuple(chunks))


def _new_blocks(sequence: Sequence, num_tokens: int, limits: Limits) -> int:
    blocks = -(-(sequence.num_computed + num_tokens) // limits.block_size)
    return limits.num_groups * max(0, blocks - sequence.num_blocks)


def _fitting_chunk(sequence: Sequence, num_tokens: int, free_blocks: int, limits: Limits) -> int:
    """At most `num_tokens`, shortened to what the free blocks hold."""
    room = (sequence.num_blocks + free_blocks // limits.num_groups) * limits.block_size - sequence.num_computed
    return max(0, min(num_tokens, room))


def _victim(ordered: collections.abc.Sequence[S]) -> AttemptRef | None:
    """The least important request, unless it is the only one: then it waits for blocks that reservations hold."""
    return ordered[-1].ref if ordered[-1].ref != ordered[0].ref else None
