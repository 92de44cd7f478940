"""Every way through the workers, driven step by step: choices, forced tokens, ends, cancels, leases, streams."""

from __future__ import annotations

from typing import Any

import pytest

from baton.config import DecodeConfig, PrefillConfig
from baton.errors import (
    CancelledRequestError,
    DeadlineError,
    DuplicateRequestError,
    UnavailableError,
)
from baton.internal.v1 import worker_pb2
from baton.requests import AttemptRef, Delivered, FinishReason, RequestSpec
from baton.wire import ref_to_wire
from tests.cluster.oracle import prompt_of
from tests.composed import LEASE_S, MakePair, finish_alone


class TestChoices:
    @pytest.mark.parametrize("length", [15, 16, 17, 40])
    @pytest.mark.parametrize("local", [False, True])
    def test_choices_share_the_prompt_and_differ_by_their_random_numbers(
        self, make_pair: MakePair, length: int, local: bool
    ) -> None:
        pair = make_pair()
        sampling: dict[str, Any] = {"n": 3, "temperature": 1.0, "seed": 7, "max_tokens": 12}
        spec = pair.start(pair.spec(prompt_of(length), **sampling), local_prefill=local)
        pair.run()
        choices = [pair.tokens(spec, choice) for choice in range(3)]
        assert len({tuple(choice) for choice in choices}) == 3
        # A choice alone draws the same tokens: they depend on (seed, choice, position) and on nothing else.
        assert finish_alone(pair, prompt_of(length), **{**sampling, "n": 1}) == [choices[0]]

    def test_full_blocks_are_shared_and_the_partial_last_one_is_copied(self, make_pair: MakePair) -> None:
        pair = make_pair()
        pool = pair.decode_engine.cache.pool
        spec = pair.start(pair.spec(prompt_of(40), n=4, temperature=1.0, max_tokens=5))
        # 40 tokens: two full blocks and a partial one, with a tail for each further choice.
        assert pool.num_usable - pool.num_free == 3 + 3
        pair.run()
        assert len(pair.tokens(spec, 3)) == 5

    def test_choices_may_end_at_different_times(self, make_pair: MakePair) -> None:
        pair = make_pair()
        base = finish_alone(pair, prompt_of(20), n=2, temperature=1.0, seed=3, max_tokens=12)
        stop = base[0][4]
        spec = pair.start(pair.spec(prompt_of(20), n=2, temperature=1.0, seed=3, max_tokens=12, stop_token_ids=(stop,)))
        pair.run()
        assert pair.tokens(spec, 0) == base[0][: base[0].index(stop) + 1]
        end = base[1].index(stop) + 1 if stop in base[1] else None
        assert pair.tokens(spec, 1) == base[1][:end]


class TestForcedTokens:
    @pytest.mark.parametrize("local", [False, True])
    @pytest.mark.parametrize("num_delivered", [1, 5, 11])
    def test_a_replay_continues_where_the_client_stands(
        self, make_pair: MakePair, local: bool, num_delivered: int
    ) -> None:
        pair = make_pair()
        sampling: dict[str, Any] = {"temperature": 0.9, "seed": 11, "max_tokens": 12, "frequency_penalty": 0.5}
        (whole,) = finish_alone(pair, prompt_of(30), **sampling)
        replay = pair.spec(prompt_of(30), attempt=2, delivered=[Delivered(tuple(whole[:num_delivered]))], **sampling)
        pair.start(replay, local_prefill=local)
        pair.run()
        assert pair.tokens(replay) == whole
        # Nothing that was delivered is sampled or sent again.
        resent = [token for token in [*pair.first_tokens(replay), *pair.outbox.tokens] if token.ref == replay.ref]
        assert min(token.position for token in resent) == num_delivered

    @pytest.mark.parametrize("local", [False, True])
    def test_choices_are_replayed_each_from_its_own_tokens(self, make_pair: MakePair, local: bool) -> None:
        pair = make_pair()
        sampling: dict[str, Any] = {"n": 3, "temperature": 0.9, "seed": 5, "max_tokens": 12}
        whole = finish_alone(pair, prompt_of(30), **sampling)
        delivered = [Delivered(tuple(whole[0][:7])), Delivered(()), Delivered(tuple(whole[2]), finished=True)]
        replay = pair.start(pair.spec(prompt_of(30), attempt=2, delivered=delivered, **sampling), local_prefill=local)
        pair.run()
        assert [pair.tokens(replay, choice) for choice in range(3)] == whole

    def test_local_prefills_that_end_in_one_step_keep_their_logits_apart(self, make_pair: MakePair) -> None:
        pair = make_pair()
        sampling: dict[str, Any] = {"n": 2, "temperature": 0.9, "seed": 5, "max_tokens": 10}
        replayed = finish_alone(pair, prompt_of(20, 1), **sampling)
        fresh = finish_alone(pair, prompt_of(20, 2), **sampling)
        # One has no choice to sample, the other two: as many as there are rows.
        delivered = [Delivered(tuple(choice[:3])) for choice in replayed]
        first = pair.spec(prompt_of(20, 1), attempt=2, delivered=delivered, salt="a", **sampling)
        second = pair.spec(prompt_of(20, 2), salt="a", **sampling)
        for spec in (first, second):
            pair.start(spec, local_prefill=True)
        pair.run()
        assert [pair.tokens(first, choice) for choice in range(2)] == replayed
        assert [pair.tokens(second, choice) for choice in range(2)] == fresh


class TestEnds:
    def test_a_first_token_that_ends_the_only_choice_aborts_the_push(self, make_pair: MakePair) -> None:
        pair = make_pair()
        ((first, *_),) = finish_alone(pair, prompt_of(30))
        endings: list[dict[str, Any]] = [{"max_tokens": 1}, {"stop_token_ids": (first,)}, {"eos_token_ids": (first,)}]
        for ending in endings:
            spec = pair.start(pair.spec(prompt_of(30), **ending))
            pair.run()
            assert pair.tokens(spec) == [first]
            done = pair.events[spec.ref][-1]
            assert isinstance(done, worker_pb2.PrefillEvent)
            assert not done.done.committed
            assert pair.outbox.states(spec.ref) == []

    def test_a_first_token_that_ends_one_choice_of_two_leaves_the_other_running(self, make_pair: MakePair) -> None:
        pair = make_pair()
        whole = finish_alone(pair, prompt_of(30), n=2, temperature=1.0, seed=1)
        assert whole[0][0] != whole[1][0]
        spec = pair.start(pair.spec(prompt_of(30), n=2, temperature=1.0, seed=1, stop_token_ids=(whole[0][0],)))
        pair.run()
        assert pair.tokens(spec, 0) == whole[0][:1]
        assert len(pair.tokens(spec, 1)) > 1

    def test_min_tokens_keeps_endings_away(self, make_pair: MakePair) -> None:
        pair = make_pair()
        ((first, *_),) = finish_alone(pair, prompt_of(30))
        spec = pair.start(pair.spec(prompt_of(30), stop_token_ids=(first,), min_tokens=4, max_tokens=6))
        pair.run()
        assert first not in pair.tokens(spec)[:4]

    def test_the_finish_reason_comes_with_the_last_token(self, make_pair: MakePair) -> None:
        pair = make_pair()
        spec = pair.start(pair.spec(prompt_of(30), max_tokens=3))
        pair.run()
        assert [token.finish_reason for token in pair.outbox.tokens] == [FinishReason.NONE, FinishReason.LENGTH]
        assert pair.outbox.states(spec.ref) == ["DECODING", "FINISHED"]


class TestCancel:
    def test_a_cancel_that_overtakes_its_request_leaves_a_tombstone(self, make_pair: MakePair) -> None:
        pair = make_pair()
        spec = pair.spec(prompt_of(30))
        pair.decode.cancel(spec.ref)
        pair.prefill.cancel(spec.ref)
        with pytest.raises(CancelledRequestError):
            pair.decode.reserve(spec, local_prefill=False)
        other = pair.spec(prompt_of(30))
        ticket = pair.reserve(other)
        pair.prefill.cancel(other.ref)
        pair.submit(other, ticket)
        assert isinstance(pair.error(other), CancelledRequestError)
        pair.decode.cancel(other.ref)
        pair.run()

    @pytest.mark.parametrize("prefill_steps", [0, 1, 2])
    def test_cancelling_both_legs_mid_prefill_frees_all_blocks(self, make_pair: MakePair, prefill_steps: int) -> None:
        pair = make_pair(prefill=PrefillConfig(max_batch_tokens=16))
        spec = pair.start(pair.spec(prompt_of(60)))
        for _ in range(prefill_steps):
            pair.step_prefill()
        pair.decode.cancel(spec.ref)
        pair.prefill.cancel(spec.ref)
        pair.run()
        assert pair.outbox.tokens == []

    def test_cancelling_the_decode_leg_alone_fails_the_push(self, make_pair: MakePair) -> None:
        pair = make_pair(prefill=PrefillConfig(max_batch_tokens=16))
        spec = pair.start(pair.spec(prompt_of(60)))
        pair.step_prefill()
        pair.decode.cancel(spec.ref)
        pair.run()
        assert pair.error(spec) is not None

    def test_a_commit_that_arrives_after_the_cancel_starts_nothing(self, make_pair: MakePair) -> None:
        pair = make_pair()
        spec = pair.start(pair.spec(prompt_of(60)))
        while not pair.first_tokens(spec):
            pair.step_prefill()
        # The frames and the commit are on their way, or there already, and the decode loop has not heard of them.
        pair.decode.cancel(spec.ref)
        pair.run()
        assert pair.outbox.tokens == []
        assert pair.outbox.states(spec.ref) == []

    def test_cancelling_mid_decode_frees_all_blocks_and_drops_what_was_not_sent(self, make_pair: MakePair) -> None:
        pair = make_pair()
        spec = pair.start(pair.spec(prompt_of(60), max_tokens=100, n=2, temperature=1.0))
        while len(pair.outbox.tokens) < 10:
            pair.step_prefill()
            pair.step_decode()
        pair.decode.cancel(spec.ref)
        pair.decode.cancel(spec.ref)
        assert pair.outbox.num_records == 0
        pair.run()

    def test_a_new_attempt_takes_the_place_of_an_older_one(self, make_pair: MakePair) -> None:
        pair = make_pair()
        first = pair.start(pair.spec(prompt_of(60), request_id="same"))
        second = pair.start(pair.spec(prompt_of(60), request_id="same", attempt=2))
        with pytest.raises(DuplicateRequestError):
            pair.decode.reserve(first, local_prefill=False)
        pair.run()
        assert len(pair.tokens(second)) == 8
        assert not any(token.ref == first.ref for token in pair.outbox.tokens)


class TestLeasesAndDeadlines:
    def test_a_reservation_whose_lease_runs_out_is_given_back(self, make_pair: MakePair) -> None:
        pair = make_pair()
        spec = pair.spec(prompt_of(60))
        pair.reserve(spec)
        pair.clock.now_s += LEASE_S - 1
        pair.step_decode()
        assert not pair.decode.is_idle
        assert pair.decode_leases.renew([spec.ref]) == []
        pair.clock.now_s += LEASE_S - 1
        pair.step_decode()
        assert not pair.decode.is_idle
        pair.clock.now_s += 2
        pair.run()

    def test_prefill_of_a_router_that_is_gone_ends_with_its_lease(self, make_pair: MakePair) -> None:
        pair = make_pair(prefill=PrefillConfig(max_batch_tokens=16))
        spec = pair.start(pair.spec(prompt_of(60)))
        pair.step_prefill()
        pair.clock.now_s += LEASE_S + 1
        pair.run()
        assert isinstance(pair.error(spec), UnavailableError)

    def test_a_deadline_ends_either_leg(self, make_pair: MakePair) -> None:
        pair = make_pair(prefill=PrefillConfig(max_batch_tokens=16))
        early = pair.start(pair.spec(prompt_of(60), timeout_s=1.0))
        late = pair.start(pair.spec(prompt_of(20, 1), timeout_s=5.0, max_tokens=500))
        pair.step_prefill()
        pair.clock.now_s += 2
        while len(pair.outbox.tokens) < 3:
            pair.step_prefill()
            pair.step_decode()
        assert isinstance(pair.error(early), DeadlineError)
        pair.clock.now_s += 5
        pair.run()
        assert pair.outbox.states(late.ref)[-1] == "FAILED"
        assert pair.outbox.updates[-1].status == "DEADLINE_EXCEEDED"

    def test_the_workers_wake_for_the_next_expiry(self, make_pair: MakePair) -> None:
        pair = make_pair()
        assert pair.decode.next_wakeup_s() is None
        spec = pair.spec(prompt_of(60), timeout_s=3.0)
        pair.reserve(spec)
        assert pair.decode.next_wakeup_s() == pytest.approx(3.0)
        pair.decode.cancel(spec.ref)
        assert pair.decode.next_wakeup_s() is None
        pair.run()


class TestStreams:
    def test_a_choice_that_nobody_acknowledges_is_paused_and_others_go_on(self, make_pair: MakePair) -> None:
        pair = make_pair()
        slow = pair.start(pair.spec(prompt_of(20), max_tokens=30, max_unacked_tokens=5))
        fast = pair.start(pair.spec(prompt_of(20, 1), max_tokens=30))
        while "FINISHED" not in pair.outbox.states(fast.ref):
            pair.step_prefill()
            pair.step_decode()
        assert len([token for token in pair.outbox.tokens if token.ref == slow.ref]) == 5
        while "FINISHED" not in pair.outbox.states(slow.ref):
            position = 1 + len([token for token in pair.outbox.tokens if token.ref == slow.ref])
            pair.outbox.acknowledge([worker_pb2.Cursor(ref=ref_to_wire(slow.ref), choice=0, position=position)])
            pair.step_decode()
        assert len(pair.tokens(slow)) == 30

    def test_a_local_prefill_adds_one_small_chunk_to_each_step(self, make_pair: MakePair) -> None:
        pair = make_pair(decode=DecodeConfig(prefill_chunk_tokens=16))
        pair.start(pair.spec(prompt_of(20), max_tokens=40))
        while len(pair.outbox.tokens) < 2:
            pair.step_prefill()
            pair.step_decode()
        before = len(pair.outbox.tokens)
        local = pair.start(pair.spec(prompt_of(160, 3), max_tokens=2), local_prefill=True)
        while not any(token.ref == local.ref for token in pair.outbox.tokens):
            assert pair.step_decode()
        assert len([t for t in pair.outbox.tokens if t.ref != local.ref]) - before == 10
        pair.run()

    def test_a_step_that_fails_ends_its_requests_and_nothing_else(
        self, make_pair: MakePair, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pair = make_pair()
        spec: RequestSpec = pair.start(pair.spec(prompt_of(20), max_tokens=40))
        while len(pair.outbox.tokens) < 2:
            pair.step_prefill()
            pair.step_decode()
        waiting = pair.spec(prompt_of(20, 1))
        pair.reserve(waiting)

        def fails(*_args: object, **_kwargs: object) -> None:
            raise RuntimeError("out of luck")

        with monkeypatch.context() as patch:
            patch.setattr("engine.model_runner.ModelRunner.execute_batch", fails)
            with pytest.raises(RuntimeError) as caught:
                pair.step_decode()
        pair.decode.fail(caught.value)
        assert pair.outbox.updates[-1].status == "INTERNAL"
        assert not any(ref_to_wire(waiting.ref) == update.ref for update in pair.outbox.updates)
        assert pair.outbox.states(spec.ref)[-1] == "FAILED"
        pair.decode.cancel(AttemptRef(waiting.ref.request_id, 1))
