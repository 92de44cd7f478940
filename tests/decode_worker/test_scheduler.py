"""The decode scheduler as a specification, and its invariants under a simulated pool."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
from hypothesis import given, settings

from baton.requests import AttemptRef
from decode_worker.scheduler import Limits, Plan, Sequence, plan_step

BLOCK = 4
LIMITS = Limits(max_seqs=8, prefill_tokens=6, block_size=BLOCK, num_groups=1)


def sequence(
    name: str,
    num_tokens: int,
    num_computed: int,
    *,
    arrival: int = 0,
    priority: int = 0,
    choice: int = 0,
    num_blocks: int | None = None,
    num_pending: int = 0,
    paused: bool = False,
) -> Sequence:
    blocks = -(-num_computed // BLOCK) if num_blocks is None else num_blocks
    ref = AttemptRef(name, 1)
    return Sequence(ref, priority, arrival, num_tokens, num_computed, blocks, choice, num_pending, paused)


def work(plan: Plan[Sequence]) -> list[tuple[str, int]]:
    """(request, tokens) of what is computed, decodes first."""
    decodes = [(sequence.ref.request_id, 1) for sequence in plan.decodes]
    return decodes + [(chunk.sequence.ref.request_id, chunk.num_tokens) for chunk in plan.chunks]


def test_decodes_come_before_chunks_of_local_prefill() -> None:
    plan = plan_step([sequence("p", 40, 0), sequence("d", 9, 8, arrival=1)], 100, LIMITS)
    assert work(plan) == [("d", 1), ("p", 6)]


def test_the_chunk_budget_is_shared_and_bounds_what_a_prompt_adds_to_a_step() -> None:
    plan = plan_step([sequence("a", 4, 0), sequence("b", 40, 0, arrival=1)], 100, LIMITS)
    assert work(plan) == [("a", 4), ("b", 2)]


def test_a_rest_that_one_step_can_end_does_not_wait_behind_longer_ones() -> None:
    longer, short = sequence("a", 40, 0), sequence("b", 12, 8, arrival=1)
    assert work(plan_step([longer, short], 100, LIMITS)) == [("b", 4), ("a", 2)]
    long_too = sequence("c", 20, 8, arrival=1)
    assert work(plan_step([longer, long_too], 100, LIMITS)) == [("a", 6)]
    unimportant = sequence("d", 12, 8, arrival=1, priority=1)
    assert work(plan_step([longer, unimportant], 100, LIMITS)) == [("a", 6)]


def test_a_token_that_only_the_device_knows_is_computed_like_any_other() -> None:
    plan = plan_step([sequence("ahead", 9, 9, num_pending=1), sequence("through", 9, 9, arrival=1)], 100, LIMITS)
    assert work(plan) == [("ahead", 1)]


def test_a_paused_sequence_is_left_out_and_keeps_its_blocks() -> None:
    plan = plan_step([sequence("slow", 9, 8, paused=True), sequence("d", 9, 8, arrival=1)], 100, LIMITS)
    assert work(plan) == [("d", 1)]


def test_without_a_block_the_newest_of_the_lowest_priority_is_preempted() -> None:
    full = [
        sequence("old", 9, 8),
        sequence("new", 9, 8, arrival=2),
        sequence("low", 6, 5, arrival=1, priority=5),
    ]
    assert plan_step(full, 0, LIMITS).preempt == AttemptRef("low", 1)
    assert plan_step(full[:2], 0, LIMITS).preempt == AttemptRef("new", 1)


def test_the_only_request_is_never_preempted_but_waits_for_blocks_that_reservations_hold() -> None:
    assert plan_step([sequence("only", 9, 8)], 0, LIMITS) == Plan()
    choices = [sequence("only", 9, 8), sequence("only", 9, 8, choice=1)]
    assert plan_step(choices, 1, LIMITS).preempt is None


def test_a_chunk_shrinks_to_the_free_blocks() -> None:
    assert work(plan_step([sequence("p", 40, 0)], 1, LIMITS)) == [("p", 4)]


def test_a_prompt_preempts_nobody_while_others_run() -> None:
    plan = plan_step([sequence("p", 40, 8), sequence("d", 10, 9, arrival=1)], 0, LIMITS)
    assert plan.preempt is None
    assert work(plan) == [("d", 1)]


@dataclasses.dataclass
class Request:
    """A request in the simulation: its scheduler view and the tokens that it is to reach."""

    view: Sequence
    target: int


request_shapes = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2)), min_size=1, max_size=8)


@settings(max_examples=200)
@given(request_shapes, st.integers(10, 24))
def test_all_requests_end_whatever_the_pool_and_the_first_in_order_is_never_preempted(
    shapes: list[tuple[int, int, int]], num_blocks: int
) -> None:
    requests = {
        AttemptRef(str(index), 1): Request(
            sequence(str(index), prompt, 0, arrival=index, priority=priority), target=prompt + generated
        )
        for index, (prompt, generated, priority) in enumerate(shapes)
    }
    waiting = dict(requests)
    running: dict[AttemptRef, Request] = {}
    for _ in range(2_000):
        # As the worker's admission does: a request comes in when all that it has so far fits, or when it is alone.
        for ref, request in sorted(waiting.items(), key=lambda item: item[1].view.order):
            free = num_blocks - sum(-(-r.view.num_tokens // BLOCK) for r in running.values())
            if -(-request.view.num_tokens // BLOCK) < free or not running:
                running[ref] = waiting.pop(ref)
        if not running:
            break
        first = min((r.view for r in running.values()), key=lambda view: view.order)
        used = sum(r.view.num_blocks for r in running.values())
        assert used <= num_blocks
        ordered = sorted((r.view for r in running.values()), key=lambda view: view.order)
        plan = plan_step(ordered, num_blocks - used, LIMITS)
        if plan.preempt is not None:
            assert plan.preempt != first.ref
            victim = running.pop(plan.preempt)
            victim.view.num_computed = victim.view.num_blocks = 0
            waiting[plan.preempt] = victim
            continue
        assert not plan.is_empty, "nothing runs and nobody is preempted"
        assert len(plan.decodes) <= LIMITS.max_seqs
        assert sum(chunk.num_tokens for chunk in plan.chunks) <= LIMITS.prefill_tokens
        computed = [(view, 1) for view in plan.decodes]
        computed += [(chunk.sequence, chunk.num_tokens) for chunk in plan.chunks]
        for view, num_tokens in computed:
            view.num_computed += num_tokens
            view.num_blocks = max(view.num_blocks, -(-view.num_computed // BLOCK))
            if view.num_remaining == 0:
                if view.num_tokens == requests[view.ref].target:
                    del running[view.ref]
                else:
                    view.num_tokens += 1
    assert not running
    assert not waiting
