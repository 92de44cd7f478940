"""More requests than blocks: preemption, refusals and promises, driven step by step."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

from baton.config import DecodeConfig, PrefillConfig
from baton.errors import (
    InvalidRequestError,
)
from baton.requests import Delivered
from tests.cluster.oracle import prompt_of
from tests.composed import MakePair, finish_alone


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
