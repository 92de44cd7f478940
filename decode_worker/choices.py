"""From a prefix that is computed to a sequence for each choice. Called by the decode loop on the engine thread."""

from __future__ import annotations

from collections.abc import Mapping

from decode_worker.request import DecodeRequest, TokenSequence
from engine.kv.cache import KVCache, SequenceBlocks
from engine.sampling_state import SamplingState


def fork_choices(request: DecodeRequest, firsts: Mapping[int, tuple[int, bool]], cache: KVCache) -> None:
    """Gives the request a sequence for every choice that goes on, whose token after the prefix is to be computed next.

    All choices share the full blocks; each but the last takes a copy of the partial one from the request's tails, and
    the last the shared sequence's own blocks. Where no choice goes on these are freed. What fails midway leaves every
    block with the request, whose end frees them.

    Args:
        firsts: for each choice its token after the prefix, and whether it has ended with it.
    """
    shared = request.shared
    assert shared is not None
    going = [
        choice
        for choice, (_, finished) in sorted(firsts.items())
        if not finished and choice not in request.ended_choices
    ]
    for index, choice in enumerate(going):
        if index == len(going) - 1:
            blocks = shared.blocks
        else:
            tail = request.tails.pop() if request.tails else None
            forked = cache.fork(shared.blocks, shared.num_computed, tail=tail)
            assert forked is not None, "the tails of a request's choices are reserved with it"
            blocks = forked
        request.sequences[choice] = _sequence(request, shared, choice, blocks, firsts[choice][0], cache)
    cache.free_tails(request.tails)
    request.tails = []
    if not going:
        cache.free(shared.blocks)
    request.shared = None


def _sequence(
    request: DecodeRequest,
    shared: TokenSequence,
    choice: int,
    blocks: SequenceBlocks,
    first_token_id: int,
    cache: KVCache,
) -> TokenSequence:
    spec = request.spec
    state = SamplingState(spec.sampling, spec.prompt_token_ids, choice=choice, grammar=request.grammar)
    generated = [*shared.token_ids[len(spec.prompt_token_ids) :], first_token_id]
    if spec.sampling.n > 1 and spec.forced_tokens(choice):
        generated = list(spec.forced_tokens(choice))
    state.extend(generated)
    token_ids = [*spec.prompt_token_ids, *generated]
    return TokenSequence(
        ref=spec.ref,
        priority=spec.priority,
        arrival=request.arrival,
        num_tokens=len(token_ids),
        num_computed=shared.num_computed,
        num_blocks=cache.layout.num_blocks(shared.num_computed),
        choice=choice,
        token_ids=token_ids,
        blocks=blocks,
        block_hashes=list(shared.block_hashes),
        salt_root=shared.salt_root,
        num_prompt_tokens=len(spec.prompt_token_ids),
        states=[state],
        lane=request.mailbox.lanes[choice],
    )
