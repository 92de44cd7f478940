"""Every way through the workers, driven step by step: choices, forced tokens, preemption, cancels, leases, caches."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from baton.config import DecodeConfig, PrefillConfig
from baton.errors import (
    CancelledRequestError,
    DeadlineError,
    DuplicateRequestError,
    InvalidRequestError,
    UnavailableError,
)
from baton.internal.v1 import worker_pb2
from baton.requests import AttemptRef, Delivered, FinishReason, RequestSpec
from baton.wire import ref_to_wire
from tests.cluster.oracle import prompt_of
from tests.composed import LEASE_S, Pair
from tests.engine.checkpoints import make_checkpoint

MakePair = Callable[..., Pair]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return make_checkpoint("gemma3", tmp_path_factory.mktemp("models") / "gemma3")


@pytest.fixture
def make_pair(llama: pathlib.Path) -> Iterator[MakePair]:
    """Makes pairs; at the end each must be empty."""
    pairs: list[Pair] = []

    def make(model: pathlib.Path = llama, **kwargs: Any) -> Pair:
        pairs.append(Pair(model, **kwargs))
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.run()
        pair.assert_empty()
        pair.close()


def finish_alone(pair: Pair, prompt: list[int], **sampling: Any) -> list[list[int]]:
    """The tokens of each choice of a request that has the workers to itself."""
    spec = pair.start(pair.spec(prompt, **sampling))
    pair.run()
    return [pair.tokens(spec, choice) for choice in range(spec.sampling.n)]


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


class TestPrefixCache:
    def test_the_next_turn_of_a_chat_hits_prompt_and_answer(self, make_pair: MakePair) -> None:
        pair = make_pair()
        first = prompt_of(40)
        (answer,) = finish_alone(pair, first, max_tokens=30)
        second = pair.spec([*first, *answer, *prompt_of(5, 9)])
        ticket = pair.reserve(second, local_prefill=True)
        # 70 tokens; the last sampled one was never computed, so 69 have KV: four full blocks.
        assert ticket.cached_tokens == 64
        before = pair.decode_metrics.computed_tokens.labels(kind="prefill")._value.get()
        pair.run()
        assert pair.decode_metrics.computed_tokens.labels(kind="prefill")._value.get() - before == 75 - 64
        assert pair.tokens(second) == finish_alone(make_pair(), list(second.prompt_token_ids))[0]

    def test_another_salt_never_hits(self, make_pair: MakePair) -> None:
        pair = make_pair()
        prompt = prompt_of(64)
        pair.start(pair.spec(prompt, salt="a"))
        pair.run()
        other = pair.spec(prompt, salt="b")
        assert pair.reserve(other).cached_tokens == 0
        pair.decode.cancel(other.ref)
        same = pair.spec(prompt, salt="a")
        assert pair.reserve(same).cached_tokens == 64
        pair.decode.cancel(same.ref)

    def test_a_prompt_shared_by_many_is_computed_once(self, make_pair: MakePair) -> None:
        pair = make_pair(prefill=PrefillConfig(max_batch_tokens=32))
        shared = prompt_of(96)
        specs = [pair.start(pair.spec([*shared, *prompt_of(6, seed)])) for seed in range(5)]
        pair.run()
        computed = pair.prefill_metrics.computed_tokens.labels(kind="prefill")._value.get()
        assert computed == 96 + 5 * 6
        fresh = make_pair()
        for spec in specs:
            assert pair.tokens(spec) == finish_alone(fresh, list(spec.prompt_token_ids))[0]

    def test_a_prompt_that_waits_for_a_shared_prefix_goes_on_when_the_other_is_cancelled(
        self, make_pair: MakePair
    ) -> None:
        pair = make_pair(prefill=PrefillConfig(max_batch_tokens=16))
        first = pair.start(pair.spec(prompt_of(64)))
        second = pair.start(pair.spec(prompt_of(64)))
        pair.step_prefill()
        pair.prefill.cancel(first.ref)
        pair.decode.cancel(first.ref)
        pair.run()
        assert len(pair.tokens(second)) == 8

    def test_only_what_decode_lacks_is_sent(self, make_pair: MakePair) -> None:
        pair = make_pair()
        prompt = prompt_of(64)
        finish_alone(pair, prompt)
        spec = pair.start(pair.spec([*prompt, *prompt_of(20, 5)]))
        pair.run()
        done = pair.events[spec.ref][-1]
        assert isinstance(done, worker_pb2.PrefillEvent)
        # 84 tokens are six blocks, of which decode has four.
        assert done.done.bytes == 2 * pair.decode_engine.layout.block_bytes

    def test_sliding_layers_send_their_window_only(self, make_pair: MakePair, gemma3: pathlib.Path) -> None:
        pair = make_pair(gemma3, block_size=8)
        layout = pair.decode_engine.layout
        spec = pair.start(pair.spec(prompt_of(64)))
        pair.run()
        done = pair.events[spec.ref][-1]
        assert isinstance(done, worker_pb2.PrefillEvent)
        # Window 8 of 64 tokens: a query at 64 sees 57..64, so the last block of each sliding layer, all of the full
        # one.
        full = sum(len(group.layers) for group in layout.groups if group.window is None)
        sliding = sum(len(group.layers) for group in layout.groups if group.window is not None)
        assert done.done.bytes == layout.page_bytes * (8 * full + 1 * sliding)


class TestScarcity:
    def test_a_refused_reservation_changes_nothing(self, make_pair: MakePair) -> None:
        pair = make_pair(decode_blocks=12)
        holder = pair.spec(prompt_of(100), max_tokens=10)
        pair.reserve(holder)
        free = pair.decode_engine.cache.num_free
        response = pair.decode.reserve(pair.spec(prompt_of(90, 1)), local_prefill=False)
        assert response.refusal.reason == "blocks"
        assert pair.decode_engine.cache.num_free == free
        pair.decode.cancel(holder.ref)

    def test_a_request_that_can_never_fit_is_invalid(self, make_pair: MakePair) -> None:
        pair = make_pair(decode_blocks=12)
        beyond: list[dict[str, Any]] = [{"max_tokens": 100}, {"n": 16, "max_tokens": 30}]
        for too_much in beyond:
            with pytest.raises(InvalidRequestError, match="max_tokens"):
                pair.decode.reserve(pair.spec(prompt_of(90), **too_much), local_prefill=False)

    def test_the_newest_is_preempted_and_resumes_with_the_same_tokens(self, make_pair: MakePair) -> None:
        roomy = make_pair()
        sampling: dict[str, Any] = {"max_tokens": 60, "temperature": 0.8, "seed": 2}
        expected = [finish_alone(roomy, prompt_of(40, seed), **sampling)[0] for seed in (1, 2)]
        pair = make_pair(decode_blocks=11)
        old = pair.start(pair.spec(prompt_of(40, 1), **sampling))
        new = pair.start(pair.spec(prompt_of(40, 2), **sampling))
        while "PREEMPTED" not in pair.outbox.states(new.ref):
            pair.step_prefill()
            pair.step_decode()
        delivered = tuple(pair.tokens(new))
        pair.run()
        assert pair.outbox.states(old.ref) == ["DECODING", "FINISHED"]
        resumed = pair.start(
            pair.spec(
                prompt_of(40, 2), request_id=new.ref.request_id, attempt=2, delivered=[Delivered(delivered)], **sampling
            )
        )
        pair.run()
        assert [pair.tokens(old), pair.tokens(resumed)] == expected

    def test_blocks_promised_to_an_admitted_prompt_are_not_given_to_another(self, make_pair: MakePair) -> None:
        pair = make_pair(prefill_blocks=11, prefill=PrefillConfig(max_batch_tokens=32))
        first = pair.start(pair.spec(prompt_of(128, 1)))
        pair.step_prefill()
        second = pair.start(pair.spec(prompt_of(96, 2)))
        pair.run()
        assert [len(pair.tokens(spec)) for spec in (first, second)] == [8, 8]

    def test_a_local_prefill_with_windows_keeps_the_blocks_that_it_was_promised(
        self, make_pair: MakePair, gemma3: pathlib.Path
    ) -> None:
        pair = make_pair(
            gemma3, block_size=8, decode_blocks=110, decode=DecodeConfig(prefill_chunk_tokens=16, watermark=0.0)
        )
        local = pair.start(pair.spec(prompt_of(640, 1), max_tokens=2), local_prefill=True)
        others = []
        for seed in range(40):
            pair.step_decode()
            other = pair.spec(prompt_of(60, 2 + seed), max_tokens=2)
            if pair.decode.reserve(other, local_prefill=False).HasField("ticket"):
                others.append(other)
        # Newcomers hold what was free beside the promise; the prefill ends although none of them ever starts.
        assert others
        while not any(token.ref == local.ref for token in pair.outbox.tokens):
            assert pair.step_decode()
        for other in others:
            pair.decode.cancel(other.ref)

    def test_a_replay_of_several_choices_waits_until_the_delivered_tokens_of_all_fit(self, make_pair: MakePair) -> None:
        pair = make_pair(decode_blocks=30)
        holder = pair.start(pair.spec(prompt_of(200, 1), max_tokens=30))
        delivered = [Delivered(tuple(prompt_of(48, seed))) for seed in range(4)]
        replay = pair.spec(prompt_of(32, 2), attempt=2, n=4, temperature=1.0, max_tokens=60, delivered=delivered)
        # 32 tokens are two blocks, 48 delivered ones three for each choice: 14, and the holder has 13 of 29.
        assert pair.decode.reserve(replay, local_prefill=True).HasField("ticket")
        pair.decode.cancel(replay.ref)
        second = pair.start(pair.spec(prompt_of(40, 3), max_tokens=4))
        again = pair.spec(prompt_of(32, 2), attempt=3, n=4, temperature=1.0, max_tokens=60, delivered=delivered)
        assert pair.decode.reserve(again, local_prefill=True).refusal.reason == "blocks"
        pair.run()
        assert [len(pair.tokens(spec)) for spec in (holder, second)] == [30, 4]

    def test_prompts_wait_for_blocks_of_the_prefill_pool(self, make_pair: MakePair) -> None:
        pair = make_pair(prefill_blocks=8)
        specs = [pair.start(pair.spec(prompt_of(80, seed))) for seed in range(4)]
        pair.run()
        assert all(len(pair.tokens(spec)) == 8 for spec in specs)


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
            patch.setattr("engine.model_runner.ModelRunner.execute", fails)
            with pytest.raises(RuntimeError) as caught:
                pair.step_decode()
        pair.decode.fail(caught.value)
        assert pair.outbox.updates[-1].status == "INTERNAL"
        assert not any(ref_to_wire(waiting.ref) == update.ref for update in pair.outbox.updates)
        assert pair.outbox.states(spec.ref)[-1] == "FAILED"
        pair.decode.cancel(AttemptRef(waiting.ref.request_id, 1))
