"""The batch that runs: which sequences, in which order, and how one step of them is computed.

Owned by the decode loop, on the engine thread. A step costs little beside the model: the order is sorted when somebody
joins or leaves, the rows of what decodes are kept (`engine.decode_rows`), and blocks are looked after only where a
sequence crosses from one into the next.

A step is launched, and taken when its tokens are wanted. On a GPU the next one may be launched in between: its tokens
pend then (`Sequence.num_pending`), and the device feeds them from one step to the next. A sequence that turns out to
have ended is computed once too often; nobody is told.
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
from engine.sampling import Drawn, draw
from engine.sampling_state import SamplingState
from engine.staging import to_device

Plan = scheduler.Plan[TokenSequence]
Chunk = scheduler.Chunk[TokenSequence]


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """A step on its way.

    Attributes:
        number: of `DecodeRows`; None without decodes.
        decodes: choices that take one token, and their rows.
        chunks: all else that is computed.
        reached: sequences of which all known tokens are computed then, the decodes first.
        drawn: what follows each of these, one token for each state of each; None if there are none.
        scored: chunks of prompts whose every token is scored, by request: where each starts, and its logits.
        model_s: seconds of this thread in the model so far.
    """

    number: int | None
    decodes: Sequence[TokenSequence]
    rows: Int64s
    chunks: Sequence[Chunk]
    reached: Sequence[TokenSequence]
    drawn: Drawn | None
    scored: Sequence[tuple[DecodeRequest, int, torch.Tensor]]
    model_s: float

    @property
    def sequences(self) -> list[TokenSequence]:
        """All that it computes."""
        return [*self.decodes, *(chunk.sequence for chunk in self.chunks)]

    @property
    def states(self) -> list[SamplingState]:
        """One for each token that it chooses."""
        return [state for sequence in self.reached for state in sequence.states]

    @property
    def can_be_followed(self) -> bool:
        """Whether the next step may be launched before this one is taken.

        Not where that needs tokens on the host; nor where a prompt's logits wait for their scores, so that they are
        held beside no other step's: they may be many, and a replayed step writes its own in their place.
        """
        return not self.scored and not any(sequence.states[0].looks_back for sequence in self.decodes)


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
        # The tokens of the step that was launched last, on the device.
        self._chosen: torch.Tensor | None = None

    def changed(self) -> None:
        """Sequences have joined or left."""
        self._ordered = None

    def leave(self, sequence: TokenSequence) -> None:
        """The sequence is done with; its blocks are freed. Idempotent."""
        if sequence.row is not None:
            self._rows.remove(sequence.row)
            sequence.row = None
        sequence.left = True
        self._cache.free(sequence.blocks)
        self._ordered = None

    def plan(self) -> Plan:
        """What to compute next, or whom to preempt before asking again."""
        if self._ordered is None:
            sequences = (sequence for request in self._requests.values() for sequence in request.runnable)
            self._ordered = sorted(sequences, key=lambda sequence: sequence.order)
        for sequence in self._ordered:
            sequence.paused = sequence.lane is not None and (
                sequence.lane.is_full or (sequence.num_pending > 0 and sequence.has_chosen_all)
            )
        return scheduler.plan_step(self._ordered, self._cache.num_free, self._limits)

    def launch(self, plan: Plan) -> Step:
        """Run the model over the plan's work, which is not empty, and choose tokens; a GPU is not waited for."""
        decodes, chunks = self._split(plan)
        items = [self._item(chunk) for chunk in chunks]
        batch = self._build(decodes, items)
        started_s = self._clock()
        chosen = None if batch.sources is None else self._chosen
        logits = self._runner.execute_batch(batch, chosen=chosen)
        model_s = self._clock() - started_s
        reached = list(decodes)
        # The row of logits that each token is chosen from: a prompt may have any number of choices to sample, none too.
        rows = list(range(len(decodes)))
        scored = []
        end = len(decodes)
        for chunk, item in zip(chunks, items, strict=True):
            sequence, request = chunk.sequence, self._requests[chunk.sequence.ref]
            end += item.num_logits
            if request.phase is Phase.PREFILLING and request.spec.sampling.prompt_logprobs is not None:
                scored.append((request, item.start, logits[end - item.num_logits : end]))
            sequence.num_computed += chunk.num_tokens
            if not sequence.num_remaining:
                reached.append(sequence)
                rows += [end - 1] * len(sequence.states)
        drawn = self._draw(logits, rows, [state for sequence in reached for state in sequence.states])
        for sequence in decodes:
            sequence.pend()
        number = self._rows.launched(self._indices) if decodes else None
        self._chosen = None if drawn is None else drawn.token_ids
        return Step(number, decodes, self._indices, chunks, reached, drawn, scored, model_s)

    def take(self, step: Step, token_ids: Sequence[int]) -> None:
        """A step is through, and chose these tokens; steps are taken in their order.

        Sequences that have left meanwhile are passed over.
        """
        for sequence in step.decodes:
            sequence.unpend()
            if sequence.num_settled >= sequence.next_change and not sequence.left:
                self._settle(sequence)
        for chunk in step.chunks:
            if not chunk.sequence.left:
                self._settle(chunk.sequence)
        if step.number is None:
            return
        going = [index for index, sequence in enumerate(step.decodes) if not sequence.left]
        if len(going) == len(step.decodes):
            self._rows.tell(step.number, step.rows, token_ids[: len(going)])
        else:
            self._rows.tell(step.number, step.rows[going], [token_ids[index] for index in going])

    def _draw(self, logits: torch.Tensor, rows: list[int], states: Sequence[SamplingState]) -> Drawn | None:
        if not states:
            return None
        if len(rows) < len(logits) or rows != list(range(len(logits))):
            (index,) = to_device([np.array(rows)], logits.device)
            logits = logits[index]
        return draw(logits, states)

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
        return assemble(parts, self._layout)

    def _settle(self, sequence: TokenSequence) -> None:
        """Blocks have been filled or passed by a window: others may find the former, the latter are freed."""
        num_settled = sequence.num_settled
        hashes = sequence.extend_hashes(self._limits.block_size)
        self._cache.register(sequence.blocks, hashes, num_settled)
        self._cache.free_out_of_window(sequence.blocks, num_settled)
        sequence.next_change = self._cache.next_change(num_settled)
        if sequence.row is not None:
            self._rows.set_tables(sequence.row, sequence.blocks.rows())
