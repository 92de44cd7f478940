"""Any interleaving of requests, cancels, preemptions and retries over small pools: same tokens, and nothing is left."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import random
from collections.abc import Iterator
from typing import Any

import pytest

from baton.config import DecodeConfig, PrefillConfig
from baton.errors import BatonError
from baton.requests import Delivered, RequestSpec
from tests.cluster.oracle import prompt_of
from tests.composed import Pair
from tests.engine.checkpoints import make_checkpoint

Kind = tuple[int, int, int]


@dataclasses.dataclass
class Request:
    """One request as a router holds it: how it was asked for, what came so far, and its current attempt."""

    kind: Kind
    name: str
    delivered: list[list[int]]
    attempt: int = 0
    spec: RequestSpec | None = None
    local: bool = False

    @property
    def sampling(self) -> dict[str, Any]:
        return sampling_of(self.kind)


def sampling_of(kind: Kind) -> dict[str, Any]:
    length, _, num_choices = kind
    return {"n": num_choices, "temperature": 0.9, "seed": length, "max_tokens": 12}


class RandomRouter:
    """Makes requests and steps the workers in an order that its random numbers choose."""

    def __init__(self, pair: Pair, seed: int) -> None:
        self.pair = pair
        self.random = random.Random(seed)
        self.seed = seed
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.done: list[Request] = []
        self.num_preempted = 0

    def act(self) -> None:
        """One random thing."""
        chance = self.random.random()
        if chance < 0.15 and len(self.waiting) + len(self.running) < 8:
            kind = (self.random.choice([3, 16, 40, 70]), self.random.randrange(3), self.random.choice([1, 1, 2, 3]))
            name = f"{self.seed}-{len(self.done) + len(self.running) + len(self.waiting)}-{self.random.random()}"
            self.waiting.append(Request(kind, name, [[] for _ in range(kind[2])]))
        elif chance < 0.3 and self.waiting:
            self.try_to_start(self.waiting[0])
        elif chance < 0.33 and self.running:
            self.cancel(self.random.choice(self.running))
        elif chance < 0.65:
            self.pair.step_prefill()
        else:
            self.pair.step_decode()
        self.collect()

    def finish(self) -> None:
        """Everything that is still asked for comes to its end."""
        for _ in range(5_000):
            if not self.waiting and not self.running:
                return
            if self.waiting:
                self.try_to_start(self.waiting[0])
            busy = self.pair.step_prefill() | self.pair.step_decode()
            self.collect()
            if not busy and self.running:
                self.pair.thread.wait(0.2)
        raise AssertionError(f"still waiting {self.waiting}, running {self.running}")

    def try_to_start(self, request: Request) -> None:
        length, salt, _ = request.kind
        delivered = [
            Delivered(tuple(tokens), finished=len(tokens) == request.sampling["max_tokens"])
            for tokens in request.delivered
        ]
        request.attempt += 1
        request.local = self.random.random() < 0.4
        request.spec = self.pair.spec(
            prompt_of(length, salt),
            request_id=request.name,
            attempt=request.attempt,
            delivered=delivered if any(request.delivered) else (),
            **request.sampling,
        )
        response = self.pair.decode.reserve(request.spec, local_prefill=request.local)
        if response.HasField("ticket"):
            if not request.local:
                self.pair.submit(request.spec, response.ticket)
            self.waiting.remove(request)
            self.running.append(request)

    def cancel(self, request: Request) -> None:
        """The client has gone; both legs end."""
        assert request.spec is not None
        self.pair.decode.cancel(request.spec.ref)
        if not request.local:
            self.pair.prefill.cancel(request.spec.ref)
        self.running.remove(request)

    def collect(self) -> None:
        """What came in since the last look; a preempted request goes back to the queue's head."""
        for request in list(self.running):
            spec = request.spec
            assert spec is not None
            failed = [event for event in self.pair.events.get(spec.ref, []) if isinstance(event, BatonError)]
            assert not failed, failed
            states = self.pair.outbox.states(spec.ref)
            assert "FAILED" not in states, [update.message for update in self.pair.outbox.updates]
            request.delivered = [self.pair.tokens(spec, choice) for choice in range(spec.sampling.n)]
            if "PREEMPTED" in states:
                self.num_preempted += 1
                self.running.remove(request)
                self.waiting.insert(0, request)
            elif all(len(tokens) == spec.sampling.max_tokens for tokens in request.delivered):
                self.running.remove(request)
                self.done.append(request)


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def pairs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Pair, Pair]]:
    """(cramped, roomy): pools in which requests get into each other's way and steps overlap, one to compare with."""
    model: pathlib.Path = make_checkpoint(request.param, tmp_path_factory.mktemp("models") / request.param)
    cramped = Pair(
        model,
        block_size=8,
        prefill_blocks=60 if request.param == "gemma3" else 24,
        decode_blocks=98 if request.param == "gemma3" else 50,
        prefill=PrefillConfig(max_batch_tokens=20),
        decode=DecodeConfig(prefill_chunk_tokens=9, watermark=0.0, async_scheduling="on"),
    )
    roomy = Pair(model, block_size=8)
    yield cramped, roomy
    for pair in (cramped, roomy):
        pair.close()


def test_any_interleaving_gives_the_tokens_of_a_request_alone(pairs: tuple[Pair, Pair]) -> None:
    cramped, roomy = pairs

    @functools.cache
    def alone(kind: Kind) -> list[list[int]]:
        length, salt, _ = kind
        spec = roomy.start(roomy.spec(prompt_of(length, salt), **sampling_of(kind)))
        roomy.run()
        return [roomy.tokens(spec, choice) for choice in range(spec.sampling.n)]

    num_done = num_preempted = 0
    for seed in range(12):
        router = RandomRouter(cramped, seed)
        for _ in range(150):
            router.act()
        router.finish()
        cramped.run()
        cramped.assert_empty()
        for request in router.done:
            assert request.delivered == alone(request.kind), (seed, request)
        num_done += len(router.done)
        num_preempted += router.num_preempted
        cramped.outbox.tokens.clear()
        cramped.outbox.updates.clear()
        cramped.events.clear()
    # Else the pools were too roomy for the test to mean anything.
    assert num_done > 60
    assert num_preempted > 0
