"""The prefill scheduler as a specification: order, admission and chunks."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from baton.requests import AttemptRef
from prefill_worker.scheduler import Prompt, admit, in_order, plan_chunks


def prompt(
    name: str, num_tokens: int = 10, *, priority: int = 0, arrived_s: float = 0.0, admitted: bool = False
) -> Prompt:
    return Prompt(AttemptRef(name, 1), priority, arrived_s, num_tokens, admitted=admitted)


def names(prompts: list[Prompt]) -> list[str]:
    return [p.ref.request_id for p in prompts]


def test_the_lower_priority_number_comes_first_then_the_earlier_arrival() -> None:
    prompts = [prompt("late", arrived_s=2), prompt("early", arrived_s=1), prompt("urgent", priority=-1, arrived_s=3)]
    assert names(in_order(prompts, now_s=3, ageing_s=100)) == ["urgent", "early", "late"]


def test_waiting_makes_up_for_priority() -> None:
    waited = prompt("waited", priority=1, arrived_s=0)
    fresh = prompt("fresh", priority=0, arrived_s=9)
    assert names(in_order([waited, fresh], now_s=9, ageing_s=10)) == ["fresh", "waited"]
    # Waiting 11 s longer outweighs one level at 10 s a level.
    fresh.arrived_s = 11
    assert names(in_order([waited, fresh], now_s=11, ageing_s=10)) == ["waited", "fresh"]


def test_a_prompt_that_does_not_fit_holds_back_those_behind_it() -> None:
    waiting = [prompt("a"), prompt("big"), prompt("small")]
    need = {"a": 2, "big": 9, "small": 1}
    admitted = admit(waiting, free_blocks=8, max_requests=8, blocks_needed=lambda p: need[p.ref.request_id])
    assert names(admitted) == ["a"]


def test_a_prompt_that_waits_for_a_shared_prefix_holds_nobody_back() -> None:
    waiting = [prompt("twin"), prompt("other")]
    admitted = admit(
        waiting, free_blocks=8, max_requests=8, blocks_needed=lambda p: None if p.ref.request_id == "twin" else 1
    )
    assert names(admitted) == ["other"]


def test_short_prompts_share_a_step_and_a_long_one_goes_in_chunks() -> None:
    prompts = [prompt("s1", 3, admitted=True), prompt("s2", 4, admitted=True), prompt("long", 100, admitted=True)]
    chunks = plan_chunks(prompts, max_tokens=16, max_requests=8, max_scored_tokens=1)
    assert [(c.prompt.ref.request_id, c.num_tokens) for c in chunks] == [("s1", 3), ("s2", 4), ("long", 9)]


def test_prompts_that_are_scored_share_a_budget_of_their_own() -> None:
    prompts = [prompt(name, 10, admitted=True) for name in ("s1", "s2", "s3", "plain")]
    for scored in prompts[:3]:
        scored.scored = True
    chunks = plan_chunks(prompts, max_tokens=40, max_requests=8, max_scored_tokens=12)
    assert [(c.prompt.ref.request_id, c.num_tokens) for c in chunks] == [("s1", 10), ("s2", 2), ("plain", 10)]


prompt_sizes = st.lists(st.tuples(st.integers(1, 60), st.integers(-2, 2), st.integers(0, 20)), min_size=1, max_size=12)


@given(prompt_sizes, st.integers(1, 32), st.integers(1, 6), st.integers(20, 80))
def test_every_prompt_is_computed_exactly_once_within_the_budget(
    sizes: list[tuple[int, int, int]], max_tokens: int, max_requests: int, num_blocks: int
) -> None:
    prompts = [
        prompt(str(index), num_tokens, priority=priority, arrived_s=float(arrived))
        for index, (num_tokens, priority, arrived) in enumerate(sizes)
    ]
    free = num_blocks
    computed = dict.fromkeys(names(prompts), 0)
    for step in range(10_000):
        left = [p for p in prompts if p.num_remaining]
        if not left:
            break
        ordered = in_order(left, now_s=20.0 + step, ageing_s=5)
        admitted = admit(
            ordered, free_blocks=free, max_requests=max_requests, blocks_needed=lambda p: -(-p.num_tokens // 4)
        )
        for p in admitted:
            p.admitted = True
            free -= -(-p.num_tokens // 4)
        assert free >= 0
        chunks = plan_chunks(ordered, max_tokens=max_tokens, max_requests=max_requests, max_scored_tokens=max_tokens)
        assert chunks, "prompts are left and none advances"
        assert sum(c.num_tokens for c in chunks) <= max_tokens
        assert len(chunks) <= max_requests
        for chunk in chunks:
            assert 0 < chunk.num_tokens <= chunk.prompt.num_remaining
            computed[chunk.prompt.ref.request_id] += chunk.num_tokens
            chunk.prompt.num_computed += chunk.num_tokens
            if not chunk.prompt.num_remaining:
                free += -(-chunk.prompt.num_tokens // 4)
    assert computed == {p.ref.request_id: p.num_tokens for p in prompts}
    assert free == num_blocks
