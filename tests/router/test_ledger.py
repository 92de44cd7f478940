from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.ledger import Ledger
from router.placement import Decision, Pending, Placement
from router.snapshot import WorkerKey

DECODE, PREFILL = WorkerKey("decode-0", 1), WorkerKey("prefill-0", 2)


def placement(*, prefill: WorkerKey | None = PREFILL) -> Placement:
    return Placement(decode=DECODE, prefill=prefill, decision=Decision.REMOTE, blocks=5, prefill_tokens=70, cost=0.0)


def test_a_placement_counts_on_both_workers() -> None:
    ledger = Ledger()
    ledger.charge(placement())
    assert ledger.pending == {DECODE: Pending(blocks=5, requests=1), PREFILL: Pending(prefill_tokens=70)}


def test_local_prefill_counts_at_the_decode_worker() -> None:
    ledger = Ledger()
    ledger.charge(placement(prefill=None))
    assert ledger.pending == {DECODE: Pending(blocks=5, prefill_tokens=70, requests=1)}


def test_blocks_count_until_the_first_state_after_the_reservation() -> None:
    ledger = Ledger()
    charge = ledger.charge(placement())
    ledger.state_arrived(DECODE)
    assert ledger.pending[DECODE].blocks == 5
    ledger.reserved(charge)
    assert ledger.pending[DECODE].blocks == 5
    ledger.state_arrived(DECODE)
    assert ledger.pending[DECODE] == Pending(requests=1)


def test_tokens_count_until_the_prompt_is_computed() -> None:
    ledger = Ledger()
    charge = ledger.charge(placement())
    ledger.prefilled(charge)
    ledger.prefilled(charge)
    assert PREFILL not in ledger.pending


_steps = st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["reserved", "prefilled", "release", "state"])))


@given(_steps)
def test_nothing_is_left_when_all_are_released_and_nothing_is_ever_negative(steps: list[tuple[int, str]]) -> None:
    ledger = Ledger()
    charges = [ledger.charge(placement(prefill=PREFILL if index % 2 else None)) for index in range(6)]
    for index, step in steps:
        if step == "state":
            ledger.state_arrived(DECODE)
        else:
            getattr(ledger, step)(charges[index])
        for pending in ledger.pending.values():
            assert min(pending.blocks, pending.prefill_tokens, pending.requests) >= 0
    for charge in charges:
        ledger.release(charge)
    ledger.state_arrived(DECODE)
    assert ledger.pending == {}
