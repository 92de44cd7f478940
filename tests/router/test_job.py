from __future__ import annotations

import dataclasses

from baton.hashing import extend_chain, root_hash
from baton.requests import Delivered, SamplingParams
from router.job import Prompt

ROOT = root_hash("model")


def prompt_of(num_tokens: int, *, n: int = 1) -> Prompt:
    token_ids = tuple(range(num_tokens))
    return Prompt(
        token_ids=token_ids,
        sampling=SamplingParams(max_tokens=100, n=n),
        stops=(),
        block_hashes=tuple(extend_chain(ROOT, token_ids, 16)),
        salt_root=ROOT,
        block_size=16,
        priority=0,
    )


class TestDemand:
    def test_a_first_try_demands_the_prompt(self) -> None:
        prompt = prompt_of(40)
        demand = prompt.demand()
        assert (demand.num_tokens, list(demand.own_tokens)) == (40, [0])
        assert demand.block_hashes == prompt.block_hashes
        assert list(prompt_of(40, n=3).demand().own_tokens) == [0, 0, 0]

    def test_a_single_choice_resumes_behind_what_was_delivered(self) -> None:
        """Hashes cover the delivered tokens too: the block that the prompt began, and those after it."""
        delivered = tuple(range(500, 530))
        demand = prompt_of(40).demand([Delivered(delivered)])
        assert (demand.num_tokens, list(demand.own_tokens)) == (70, [0])
        assert list(demand.block_hashes) == extend_chain(ROOT, [*range(40), *delivered], 16)

    def test_a_prompt_without_a_full_block_is_extended_from_the_root(self) -> None:
        demand = prompt_of(5).demand([Delivered(tuple(range(500, 511)))])
        assert list(demand.block_hashes) == extend_chain(ROOT, [*range(5), *range(500, 511)], 16)

    def test_choices_that_go_on_need_their_own_tokens_back(self) -> None:
        prompt = prompt_of(40, n=3)
        demand = prompt.demand([Delivered((1,) * 20), Delivered((1,) * 9, finished=True), Delivered()])
        assert (demand.num_tokens, list(demand.own_tokens)) == (40, [20, 0, 0])
        assert demand.block_hashes == prompt.block_hashes

    def test_a_prompt_that_is_scored_is_computed_whole_once(self) -> None:
        prompt = prompt_of(40)
        scored = dataclasses.replace(prompt, sampling=SamplingParams(max_tokens=9, prompt_logprobs=0))
        assert list(scored.demand().block_hashes) == []
        assert scored.demand([Delivered((1, 2))]).block_hashes == prompt.demand([Delivered((1, 2))]).block_hashes
