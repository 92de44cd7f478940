from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import UnavailableError
from baton.internal.v1 import transfer_pb2, worker_pb2
from baton.v1 import inference_pb2
from router.ledger import Ledger
from router.placement import Decision, Placement
from router.recovery import Failure, FailureKind
from router.request_state import Attempt, TokenMerge
from router.snapshot import WorkerKey

REF = transfer_pb2.AttemptRef(request_id="r", attempt=1)


def token(position: int, choice: int = 0) -> worker_pb2.TokenOut:
    return worker_pb2.TokenOut(ref=REF, choice=choice, position=position, token_id=100 + position)


def new_attempt(*, local: bool = False) -> Attempt:
    placement = Placement(
        decode=WorkerKey("decode-0", 1),
        prefill=None if local else WorkerKey("prefill-0", 2),
        decision=Decision.REMOTE,
        blocks=1,
        prefill_tokens=1,
        cost=0.0,
    )
    return Attempt(REF, Ledger().charge(placement), [0])


class Outlet:
    """What an attempt delivers to: a sink that is ready when a test says so, and the tokens that were taken."""

    def __init__(self, last_position: int | None = None) -> None:
        self.ready = True
        self.taken: list[tuple[int, int]] = []
        self._last_position = last_position
        self._drained = asyncio.Event()

    def take(self, tokens: list[worker_pb2.TokenOut]) -> bool:
        self.taken += positions(tokens)
        return tokens[-1].position == self._last_position

    def send(self, response: inference_pb2.GenerateResponse) -> None:
        raise AssertionError

    def send_token(self, request_id: str, choice: int, text: str, token_id: int) -> None:
        raise AssertionError

    async def drain(self) -> None:
        await self._drained.wait()

    def become_ready(self) -> None:
        self.ready = True
        self._drained.set()


def positions(tokens: list[worker_pb2.TokenOut]) -> list[tuple[int, int]]:
    return [(entry.choice, entry.position) for entry in tokens]


class TestTokenMerge:
    def test_decode_tokens_wait_for_the_first_one(self) -> None:
        merge = TokenMerge([0])
        merge.offer(token(1))
        merge.offer(token(2))
        assert merge.take() == []
        merge.offer(token(0))
        assert positions(merge.take()) == [(0, 0), (0, 1), (0, 2)]

    def test_choices_do_not_wait_for_each_other(self) -> None:
        merge = TokenMerge([0, 0])
        merge.offer(token(1, choice=0))
        merge.offer(token(0, choice=1))
        assert positions(merge.take()) == [(1, 0)]

    def test_a_replay_begins_after_what_was_delivered(self) -> None:
        merge = TokenMerge([3])
        merge.offer(token(2))
        merge.offer(token(3))
        assert positions(merge.take()) == [(0, 3)]

    @given(st.data())
    def test_any_order_with_any_duplicates_gives_each_token_once_in_order(self, data: st.DataObject) -> None:
        sent = [(choice, position) for choice in range(3) for position in range(6)]
        order = data.draw(st.permutations(sent + data.draw(st.lists(st.sampled_from(sent)))))
        merge = TokenMerge([0, 0, 0])
        taken = []
        for choice, position in order:
            merge.offer(token(position, choice))
            if data.draw(st.booleans()):
                taken += positions(merge.take())
        taken += positions(merge.take())
        for choice in range(3):
            assert [position for owner, position in taken if owner == choice] == list(range(6))


class TestAttempt:
    async def test_what_is_there_is_delivered_before_a_failure_ends_it(self) -> None:
        attempt, outlet = new_attempt(), Outlet()
        attempt.decoded(token(0))
        attempt.fail(Failure(FailureKind.DECODE_LOST, UnavailableError("gone")))
        await attempt.deliver(outlet, outlet.take)
        assert outlet.taken == [(0, 0)]

    async def test_tokens_wait_until_they_are_in_order(self) -> None:
        attempt, outlet = new_attempt(), Outlet(last_position=1)
        delivering = asyncio.create_task(attempt.deliver(outlet, outlet.take))
        await asyncio.sleep(0)
        attempt.decoded(token(1))
        attempt.flush()
        assert not outlet.taken
        attempt.prefilled(
            worker_pb2.PrefillEvent(first_tokens=worker_pb2.PrefillFirstTokens(tokens=[token(0)], prefill_s=0.5))
        )
        assert outlet.taken == [(0, 0), (0, 1)]
        await delivering
        assert attempt.progress.prefill_s == 0.5

    async def test_tokens_wait_while_the_client_is_behind_and_then_come_together(self) -> None:
        attempt, outlet = new_attempt(), Outlet(last_position=3)
        delivering = asyncio.create_task(attempt.deliver(outlet, outlet.take))
        await asyncio.sleep(0)
        attempt.decoded(token(0))
        attempt.flush()
        outlet.ready = False
        for position in (1, 2):
            attempt.decoded(token(position))
            attempt.flush()
            await asyncio.sleep(0)
        assert outlet.taken == [(0, 0)]
        attempt.decoded(token(3))
        outlet.become_ready()
        await delivering
        assert outlet.taken == [(0, position) for position in range(4)]

    async def test_what_a_request_raises_is_its_own(self) -> None:
        """Not its worker's stream's, which has other requests."""
        attempt, outlet = new_attempt(), Outlet()

        def fail(tokens: list[worker_pb2.TokenOut]) -> bool:
            raise BrokenPipeError

        delivering = asyncio.create_task(attempt.deliver(outlet, fail))
        await asyncio.sleep(0)
        attempt.decoded(token(0))
        attempt.flush()
        with pytest.raises(BrokenPipeError):
            await delivering

    async def test_the_first_failure_counts(self) -> None:
        attempt = new_attempt()
        first = Failure(FailureKind.PREFILL_FAILED, UnavailableError("first"))
        attempt.fail(first)
        attempt.fail(Failure(FailureKind.DECODE_LOST, UnavailableError("second")))
        assert attempt.failure is first

    async def test_once_its_tokens_are_in_and_decoding_began_the_prefill_worker_may_fail(self) -> None:
        first_tokens = worker_pb2.PrefillEvent(first_tokens=worker_pb2.PrefillFirstTokens(tokens=[token(0)]))
        only_first, only_committed, both = new_attempt(), new_attempt(), new_attempt()
        for attempt in (only_first, both):
            attempt.prefilled(first_tokens)
        for attempt in (only_committed, both):
            attempt.decoded(token(1))
        for attempt in (only_first, only_committed, both):
            attempt.prefill_failed(UnavailableError("gone"), WorkerKey("prefill-0", 2))
        assert only_first.failure is not None
        assert only_committed.failure is not None
        assert only_committed.failure.kind is FailureKind.PREFILL_FAILED
        assert both.failure is None

    async def test_a_decode_token_a_decoding_update_or_a_commit_each_show_that_the_kv_is_there(self) -> None:
        by_token, by_update, by_done = new_attempt(), new_attempt(), new_attempt()
        by_token.decoded(token(1))
        by_update.updated(worker_pb2.RequestUpdate(ref=REF, state=worker_pb2.REQUEST_STATE_DECODING))
        by_done.prefilled(worker_pb2.PrefillEvent(done=worker_pb2.PrefillDone(committed=True, transfer_s=1.5)))
        assert by_token.committed
        assert by_update.committed
        assert by_done.committed
        assert by_done.progress.exposed_transfer_s() == 1.5

    @pytest.mark.parametrize("state", [worker_pb2.REQUEST_STATE_DECODING, worker_pb2.REQUEST_STATE_FINISHED])
    async def test_cached_tokens_are_those_of_whoever_prefills(self, state: worker_pb2.RequestState.ValueType) -> None:
        """A local prefill whose first token ends the request never decodes."""
        update = worker_pb2.RequestUpdate(ref=REF, state=state, cached_tokens=48, local_prefill_s=0.25)
        remote, local = new_attempt(), new_attempt(local=True)
        remote.prefilled(worker_pb2.PrefillEvent(started=worker_pb2.PrefillStarted(cached_tokens=16)))
        remote.updated(update)
        local.updated(update)
        assert remote.progress.cached_tokens == 16
        assert local.progress.cached_tokens == 48
        assert local.progress.prefill_s == 0.25


def test_scores_of_the_prompt_that_are_sent_again_count_once() -> None:
    attempt = new_attempt(local=True)
    one = inference_pb2.PositionLogprobs()
    for start, count in ((1, 3), (1, 3), (4, 2), (1, 3), (4, 2), (6, 1)):
        attempt.scored(worker_pb2.PromptLogprobs(ref=REF, start=start, positions=[one] * count))
    assert len(attempt.prompt_logprobs) == 6


class TestExpiry:
    async def test_it_ends_the_wait(self) -> None:
        attempt, outlet = new_attempt(), Outlet()
        delivering = asyncio.create_task(attempt.deliver(outlet, outlet.take))
        await asyncio.sleep(0)
        attempt.expire()
        with pytest.raises(TimeoutError):
            await delivering

    async def test_tokens_that_are_there_are_given_first(self) -> None:
        attempt, outlet = new_attempt(), Outlet()
        attempt.expire()
        attempt.decoded(token(0))
        with pytest.raises(TimeoutError):
            await attempt.deliver(outlet, outlet.take)
        assert outlet.taken == [(0, 0)]
