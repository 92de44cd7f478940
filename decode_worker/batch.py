"""The batch that runs: which sequences, in which order, and how one step of them is computed.

Owned by the decode loop, on the engine thread. A step costs little beside the model: the order is sorted when somebody
joins or leaves, the rows of what decodes are kept (`engine.decode_rows`), and blocks are looked after only where a
sequence crosses from one into the next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from baton.config import DecodeConfig
from baton.requests import AttemptRef
from decode_worker import scheduler
from decode_worker.request import DecodeRequest, Phase, TokenSequence
from engine.batch import Batch, BatchItem, Int64s, assemble, parts_of
from engine.decode_rows import DecodeRows
from engine.engine import Engine
from engine.prompt_logprobs import num_logits

Plan = scheduler.Plan[TokenSequence]
Chunk = scheduler.Chunk[TokenSequence]


@dataclasses.dataclass(frozen=True, slots=True)
class Computed:
    """What a step computed.

    Attributes:
        num_decoded: leading entries of `reached` that are choices which took one token.
        reached: sequences of which all known tokens are computed.
        logits: float32 [len(reached), vocabulary]; what follows each of these.
        scored: chunks of prompts whose every token is scored, by request: where each starts, and its logits.
        model_s: seconds in the model.
    """

    num_decoded: int
    reached: Sequence[TokenSequence]
    logits: torch.Tensor
    scored: Sequence[tuple[DecodeRequest, int, torch.Tensor]]
    model_s: float


class RunningBatch:
    """Plans and computes steps of the requests' sequences.

    Args:
        requests: the loop's, by reference; it calls `changed` when their sequences do.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Mapping[AttemptRef, DecodeRequest],
        config: DecodeConfig,
        clock: Callable[[], float],
    ) -> None:
        self._cache = engine.cache
        self._runner = engine.runner
        self._layout = engine.layout
        self._requests = requests
        self._clock = clock
        self._limits = scheduler.Limits(
            max_seqs=config.max_batch_seqs,
            prefill_tokens=config.prefill_chunk_tokens,
            block_size=engine.layout.block_size,
            num_groups=len(engine.layout.groups),
        )
        self._rows = DecodeRows(engine.layout, config.max_batch_seqs)
        self._ordered: list[TokenSequence] | None = None
        # The rows of the choices that decoded last: mostly those that decode next.
        self._decoding: list[TokenSequence] = []
        self._indices: Int64s = np.zeros(0, np.int64)

    def changed(self) -> None:
        """Sequences have joined or left."""
        self._ordered = None

    def leave(self, sequence: TokenSequence) -> None:
        """The sequence is done with; its blocks are freed. Idempotent."""
        self.release_row(sequence)
        self._cache.free(sequence.blocks)
        self._ordered = None

    def plan(self) -> Plan:
        """What to compute next, or whom to preempt before asking again."""
        if self._ordered is None:
            sequences = (sequence for request in self._requests.values() for sequence in request.runnable)
            self._ordered = sorted(sequences, key=lambda sequence: sequence.order)
        for sequence in self._ordered:
            sequence.paused = sequence.lane is not None and sequence.lane.is_full
        return scheduler.plan_step(self._ordered, self._cache.num_free, self._limits)

    def compute(self, plan: Plan) -> Computed:
        """Run the model over the plan's work; it is not empty. `advance` must follow once tokens are chosen."""
        decodes, chunks = self._split(plan)
        items = [self._item(chunk) for chunk in chunks]
        batch = self._build(decodes, items)
        started_s = self._clock()
        logits = self._runner.execute_batch(batch)
        model_s = self._clock() - started_s
        for sequence in decodes:
            sequence.num_computed += 1
            if sequence.num_computed >= sequence.next_change:
                self._settle(sequence)
        if not chunks:
            return Computed(len(decodes), decodes, logits, (), model_s)
        reached = list(decodes)
        rows = list(range(len(decodes)))
        scored = []
        end = len(decodes)
        for chunk, item in zip(chunks, items, strict=True):
            sequence, request = chunk.sequence, self._requests[chunk.sequence.ref]
            end += item.num_logits
            if request.phase is Phase.PREFILLING and request.spec.sampling.prompt_logprobs is not None:
                scored.append((request, item.start, logits[end - item.num_logits : end]))
            sequence.num_computed += chunk.num_tokens
            self._settle(sequence)
            if not sequence.num_remaining:
                reached.append(sequence)
                rows.append(end - 1)
        return Computed(len(decodes), reached, logits if len(rows) == end else logits[rows], scored, model_s)

    def advance(self, token_ids: Sequence[int]) -> None:
        """The choices that decoded go on with these tokens."""
        if token_ids:
            self._rows.advance(self._indices, token_ids)

    def release_row(self, sequence: TokenSequence) -> None:
        """The sequence does not decode any more."""
        if sequence.row is not None:
            self._rows.remove(sequence.row)
            sequence.row = None

    def _split(self, plan: Plan) -> tuple[list[TokenSequence], list[Chunk]]:
        """Choices that decode, which have rows, and all else; with blocks for the tokens to be computed."""
        decodes: list[TokenSequence] = []
        chunks: list[Chunk] = []
        for sequence in plan.decodes:
            if sequence.lane is None:
                # A prompt of which one token is lacking.
                chunks.append(scheduler.Chunk(sequence, 1))
                continue
            if sequence.num_computed == sequence.num_blocks * self._limits.block_size:
                self._allocate(sequence, 1)
            if sequence.row is None:
                start = sequence.num_computed
                sequence.row = self._rows.add(sequence.token_ids[start], start, sequence.blocks.rows())
            decodes.append(sequence)
        chunks += plan.chunks
        for chunk in chunks:
            self._allocate(chunk.sequence, chunk.num_tokens)
        return decodes, chunks

    def _allocate(self, sequence: TokenSequence, num_tokens: int) -> None:
        end = sequence.num_computed + num_tokens
        allocated = self._cache.allocate(sequence.blocks, end)
        assert allocated, "the scheduler counted blocks that are not free"
        sequence.num_blocks = self._layout.num_blocks(end)
        if sequence.row is not None:
            self._rows.set_tables(sequence.row, sequence.blocks.rows())

    def _item(self, chunk: Chunk) -> BatchItem:
        sequence, request = chunk.sequence, self._requests[chunk.sequence.ref]
        start = sequence.num_computed
        end = start + chunk.num_tokens
        is_prompt = request.phase is Phase.PREFILLING
        return BatchItem(
            token_ids=sequence.token_ids[start:end],
            start=start,
            tables=sequence.blocks.rows(),
            num_logits=num_logits(request.spec, start, end) if is_prompt else int(end == sequence.num_tokens),
        )

    def _build(self, decodes: list[TokenSequence], items: Sequence[BatchItem]) -> Batch:
        if decodes != self._decoding:
            self._decoding = decodes
            self._indices = np.array([sequence.row for sequence in decodes], np.int64)
        parts = [self._rows.pick(self._indices)] if decodes else []
        if items:
            parts.append(parts_of(items, self._layout))
        return assemble(parts, self._layout, self._cache.kv.device)

    def _settle(self, sequence: TokenSequence) -> None:
        """Blocks have been filled or passed by a window: others may find the former, the latter are freed."""
        hashes = sequence.extend_hashes(self._limits.block_size)
        self._cache.register(sequence.blocks, hashes, sequence.num_computed)
        self._cache.free_out_of_window(sequence.blocks, sequence.num_computed)
        sequence.next_change = self._cache.next_change(sequence.num_computed)
        if sequence.row is not None:
            self._rows.set_tables(sequence.row, sequence.blocks.rows())
