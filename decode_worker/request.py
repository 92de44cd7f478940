"""One attempt at one request, as the decode loop holds it, and the sequences of its choices."""

from __future__ import annotations

import dataclasses
import enum

from baton.hashing import extend_chain
from baton.logs import RequestName
from baton.requests import FinishReason, RequestSpec
from decode_worker.outbox import Lane, Mailbox
from decode_worker.scheduler import Sequence
from decode_worker.tracing import DecodeTrace
from engine.grammar import CompiledGrammar
from engine.kv.block_pool import Block
from engine.kv.cache import SequenceBlocks
from engine.sampling_state import SamplingState


class Phase(enum.Enum):
    """RECEIVING and PREFILLING lead to DECODING; ENDED may still wait for a copy-in to let go."""

    RECEIVING = enum.auto()
    PREFILLING = enum.auto()
    DECODING = enum.auto()
    ENDED = enum.auto()


@dataclasses.dataclass(slots=True, eq=False, kw_only=True)
class TokenSequence(Sequence):
    """Tokens with their blocks: the shared prefix while it is prefilled here, then one for each choice.

    Attributes:
        token_ids: all tokens known so far, the prompt's first.
        block_hashes: hashes of the leading full blocks, as far as they were needed.
        num_prompt_tokens: where the generated tokens begin.
        states: how to sample what follows: one entry, or for a shared prefix one for each choice to be sampled.
        lane: where the tokens of a choice go; None for a shared prefix.
        row: of the batch's `DecodeRows`; None while it has none.
        left: it is done with, and its blocks are given back.
        next_change: the smallest `num_settled` at which one of its blocks is full or a window has passed one.
    """

    token_ids: list[int]
    blocks: SequenceBlocks
    block_hashes: list[bytes]
    salt_root: bytes
    num_prompt_tokens: int
    states: list[SamplingState]
    lane: Lane | None = None
    row: int | None = None
    left: bool = False
    next_change: int = 0

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    def append(self, token_id: int) -> FinishReason:
        """A token was chosen for this choice; it will be computed by the next step, unless it ends the choice."""
        state = self.states[0]
        self.token_ids.append(token_id)
        self.num_tokens += 1
        state.append(token_id)
        return state.finish_reason(token_id)

    @property
    def num_settled(self) -> int:
        """Leading tokens that are known and whose steps are through, or at least launched where they are a prompt's.

        Whatever the device is given from now on comes after these.
        """
        return self.num_computed - self.num_pending

    @property
    def has_chosen_all(self) -> bool:
        """Whether no token may follow those that were chosen, told or not."""
        state = self.states[0]
        return state.next_position >= state.params.max_tokens

    def pend(self) -> None:
        """A step that computes this choice's last token is on its way, and chooses the next."""
        self.num_computed += 1
        self.num_pending += 1
        self.states[0].num_pending += 1

    def unpend(self) -> None:
        """The oldest token that is pending is known; `append` follows if the choice goes on."""
        self.num_pending -= 1
        self.states[0].num_pending -= 1

    def extend_hashes(self, block_size: int) -> list[bytes]:
        """The hashes of all full blocks that are computed."""
        num_full = self.num_settled // block_size
        if num_full > len(self.block_hashes):
            start = len(self.block_hashes)
            parent = self.block_hashes[-1] if start else self.salt_root
            self.block_hashes += extend_chain(
                parent, self.token_ids[start * block_size : num_full * block_size], block_size
            )
        return self.block_hashes


@dataclasses.dataclass(slots=True, eq=False)
class DecodeRequest:
    """One attempt: its reservation, then its running sequences.

    Attributes:
        shared: the prefix of all choices, until they are forked from it.
        mailbox: where what its router is told goes.
        tails: one copy of the partial last block, reserved for each choice but the first.
        sequences: the running choices.
        grammar: the spec's, compiled.
        ended_choices: ended by the router, before their sequence began or since.
        trace: its spans, where tracing is on.
    """

    spec: RequestSpec
    arrival: int
    phase: Phase
    shared: TokenSequence | None
    mailbox: Mailbox
    tails: list[list[Block]]
    cached_tokens: int
    accepted_s: float
    deadline_s: float | None
    grammar: CompiledGrammar | None = None
    sequences: dict[int, TokenSequence] = dataclasses.field(default_factory=dict)
    ended_choices: set[int] = dataclasses.field(default_factory=set)
    prefill_s: float = 0.0
    started_s: float = 0.0
    first_step_s: float | None = None
    trace: DecodeTrace | None = None

    @property
    def name(self) -> RequestName:
        """For logs."""
        trace_id = "" if self.trace is None else self.trace.trace_id
        return RequestName(self.spec.ref.request_id, self.spec.ref.attempt, trace_id=trace_id)

    @property
    def runnable(self) -> list[TokenSequence]:
        """What the scheduler may compute."""
        if self.phase is Phase.PREFILLING:
            assert self.shared is not None
            return [self.shared]
        # None while KV is being received, and after the end.
        return list(self.sequences.values())
