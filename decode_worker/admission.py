"""Whether a request's prefix can be reserved now, and the reservation itself: all of its blocks or none.

Called by the decode loop on the engine thread.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable

from baton.config import DecodeConfig
from baton.errors import InvalidRequestError
from baton.requests import RequestSpec
from decode_worker.request import DecodeRequest, Phase, TokenSequence
from engine.engine import Engine
from engine.grammar import CompiledGrammar
from engine.kv.block_pool import Block
from engine.kv.prefix_index import PrefixHit
from engine.sampling_state import SamplingState, states_after_prefix


@dataclasses.dataclass(frozen=True, slots=True)
class Refused:
    """Not now; nothing was changed."""

    reason: str
    needed_blocks: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Reserved:
    """What the request now holds.

    Attributes:
        lacking: for each group the first logical block that must be received, and the physical blocks for these.
    """

    shared: TokenSequence
    tails: list[list[Block]]
    cached_tokens: int
    lacking: list[tuple[int, int, list[int]]]


class Admission:
    """Reserves blocks, keeping a share of the pool free so that running sequences can grow."""

    def __init__(self, engine: Engine, config: DecodeConfig) -> None:
        self._engine = engine
        self._cache = engine.cache
        self._layout = engine.layout
        self._config = config

    def reserve(
        self,
        spec: RequestSpec,
        running: Collection[DecodeRequest],
        *,
        arrival: int,
        local_prefill: bool,
        grammar: CompiledGrammar | None = None,
    ) -> Reserved | Refused:
        """Take the blocks of the shared prefix, and of one tail for each further choice.

        Args:
            arrival: order of arrival of the request.
            grammar: the spec's, compiled.

        Raises:
            InvalidRequestError: the request can never fit this worker.
        """
        self._check_fits_alone(spec)
        num_seqs = sum(request.spec.sampling.n for request in running) + spec.sampling.n
        if num_seqs > self._config.max_batch_seqs:
            return Refused("sequences")
        token_ids = spec.shared_token_ids
        hashes = self._engine.prefix_hashes(spec)
        hit = self._cache.match(hashes, self._most_cached(spec, local_prefill))
        num_tails = spec.sampling.n - 1
        chunk_tokens = self._config.prefill_chunk_tokens if local_prefill else None
        needed = self._cache.blocks_needed(len(token_ids), hit, chunk_tokens=chunk_tokens)
        needed += num_tails * self._cache.fork_blocks_needed(len(token_ids))
        needed += self._forced_blocks(spec)
        watermark = int(self._config.watermark * self._cache.pool.num_usable) if running else 0
        if needed > self._cache.num_free - self.num_owed(running) - watermark:
            return Refused("blocks", needed)
        states = states_after_prefix(spec, grammar) if local_prefill else []
        return self._take(spec, token_ids, hashes, hit, num_tails, states, arrival=arrival, local_prefill=local_prefill)

    def _most_cached(self, spec: RequestSpec, local_prefill: bool) -> int:
        """Leading tokens that need not be computed here, if they are cached: a local prefill computes at least one, for
        its logits, and every token of a prompt that is scored; a remote one gets logits from the prefill worker."""
        if not local_prefill:
            return len(spec.shared_token_ids)
        return 0 if spec.sampling.prompt_logprobs is not None else len(spec.shared_token_ids) - 1

    def _take(
        self,
        spec: RequestSpec,
        token_ids: tuple[int, ...],
        hashes: list[bytes],
        hit: PrefixHit,
        num_tails: int,
        states: list[SamplingState],
        *,
        arrival: int,
        local_prefill: bool,
    ) -> Reserved:
        num_tokens = len(token_ids)
        blocks = self._cache.begin(hit)
        tails = self._cache.reserve_tails(num_tails, num_tokens)
        assert tails is not None, "the tails were counted"
        lacking: list[tuple[int, int, list[int]]] = []
        if not local_prefill:
            allocated = self._cache.allocate(blocks, num_tokens, surviving_from=num_tokens)
            assert allocated, "the blocks were counted"
            first_lacking = hit.num_tokens // self._layout.block_size
            for index, (group, row) in enumerate(zip(self._layout.groups, blocks.rows(), strict=True)):
                first = max(first_lacking, group.first_visible(num_tokens) // self._layout.block_size)
                lacking.append((index, first, row[first:].tolist()))
        shared = TokenSequence(
            ref=spec.ref,
            priority=spec.priority,
            arrival=arrival,
            num_tokens=num_tokens,
            num_computed=hit.num_tokens,
            num_blocks=blocks.num_blocks,
            token_ids=list(token_ids),
            blocks=blocks,
            block_hashes=hashes,
            salt_root=spec.salt_root,
            num_prompt_tokens=len(spec.prompt_token_ids),
            states=states,
        )
        return Reserved(shared, tails, hit.num_tokens, lacking)

    def num_owed(self, requests: Iterable[DecodeRequest]) -> int:
        """Blocks that were promised with a reservation and are taken only as tokens are computed here.

        These are the chunks of local prefills, and the delivered tokens of choices that are replayed.
        """
        owed = 0
        for request in requests:
            if request.phase is not Phase.DECODING:
                owed += self._forced_blocks(request.spec)
            for sequence in request.runnable:
                if sequence.num_remaining > 1:
                    owed += self._cache.blocks_to_come(
                        sequence.blocks, sequence.num_tokens, chunk_tokens=self._config.prefill_chunk_tokens
                    )
        return owed

    def _forced_blocks(self, spec: RequestSpec) -> int:
        """Blocks beyond the prompt's for tokens that several choices are to be given, each its own."""
        if spec.sampling.n == 1:
            return 0
        num_prompt = len(spec.prompt_token_ids)
        shared = self._layout.num_blocks(num_prompt)
        return len(self._layout.groups) * sum(
            self._layout.num_blocks(num_prompt + len(choice.token_ids)) - shared
            for choice in spec.delivered
            if not choice.finished
        )

    def _check_fits_alone(self, spec: RequestSpec) -> None:
        """Were a request alone to outgrow the pool, no preemption could help it."""
        n = spec.sampling.n
        if n > self._config.max_batch_seqs:
            raise InvalidRequestError(
                "n", f"{n} is more than the {self._config.max_batch_seqs} sequences of a decode worker"
            )
        total = len(spec.prompt_token_ids) + spec.sampling.max_tokens
        chunk_tokens = self._config.prefill_chunk_tokens
        one = self._cache.blocks_needed(total, chunk_tokens=chunk_tokens)
        num_groups = len(self._layout.groups)
        own = num_groups * (self._layout.num_blocks(total) - len(spec.prompt_token_ids) // self._layout.block_size)
        needed = one + (n - 1) * min(one, own)
        if needed > self._cache.pool.num_usable:
            raise InvalidRequestError(
                "max_tokens",
                f"{n} x (prompt + max_tokens = {total}) needs {needed} KV blocks; "
                f"a decode worker has {self._cache.pool.num_usable}",
            )
