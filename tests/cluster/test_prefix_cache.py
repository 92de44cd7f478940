"""What workers find cached, and what they never share, driven step by step."""

from __future__ import annotations

import pathlib

from baton.config import PrefillConfig
from baton.internal.v1 import worker_pb2
from tests.cluster.oracle import prompt_of
from tests.composed import MakePair, finish_alone


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
