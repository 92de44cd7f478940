"""One attempt at one prompt, as the prefill loop holds it, and what it tells the router."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from baton.errors import BatonError
from baton.internal.v1 import transfer_pb2, worker_pb2
from baton.requests import RequestSpec
from baton.wire import prompt_logprobs_to_wire
from engine.grammar import CompiledGrammar
from engine.kv.cache import SequenceBlocks
from engine.prompt_logprobs import score_chunk
from kvtransfer.leading_sender import LeadingPush
from prefill_worker.scheduler import Prompt

# Takes an attempt's events in order; a BatonError or PrefillDone is the last.
EventSink = Callable[[worker_pb2.PrefillEvent | BatonError], None]


@dataclasses.dataclass(slots=True, eq=False)
class PrefillRequest:
    """One attempt at one prompt, from submission until its blocks are free.

    Attributes:
        grammar: the spec's, compiled.
    """

    spec: RequestSpec
    ticket: transfer_pb2.Ticket
    emit: EventSink
    token_ids: tuple[int, ...]
    block_hashes: list[bytes]
    prompt: Prompt
    deadline_s: float | None
    grammar: CompiledGrammar | None = None
    blocks: SequenceBlocks | None = None
    push: LeadingPush | None = None
    computed_s: float = 0.0
    ended: bool = False

    def score(self, start: int, logits: torch.Tensor) -> None:
        """Tell the router the logprobs that the chunk from position `start` on gives; one row of logits a position."""
        scored = score_chunk(self.spec, start, logits)
        for message in prompt_logprobs_to_wire(
            self.spec.ref, self.spec.prompt_token_ids, scored.start, scored.logprobs
        ):
            self.emit(worker_pb2.PrefillEvent(prompt_logprobs=message))

    def end(self, outcome: worker_pb2.PrefillEvent | BatonError) -> None:
        """Tell the router how the attempt ended; only the first outcome counts."""
        if not self.ended:
            self.ended = True
            self.emit(outcome)
