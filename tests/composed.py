"""A prefill and a decode worker composed in one process over `loopback`, driven step by step by a test.

There are no servers, no engine threads and no router: a test plays the router, and calls `step_prefill` and
`step_decode`, or `run` until everything is quiet. Pools are poisoned with NaN wherever nothing was written.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from prometheus_client import CollectorRegistry

from baton.config import CacheConfig, DecodeConfig, ModelConfig, PrefillConfig, TransferConfig
from baton.errors import BatonError
from baton.hashing import extend_chain, root_hash
from baton.internal.v1 import transfer_pb2, worker_pb2
from baton.metrics import SchedulerMetrics, TransferMetrics
from baton.requests import AttemptRef, Delivered, Logprobs, RequestSpec, SamplingParams, Token
from baton.wire import ref_from_wire, token_from_wire
from decode_worker.actor import PostedEvents
from decode_worker.loop import DecodeLoop
from decode_worker.outbox import Lane, Mailbox, Outbox
from engine.engine import Engine, load_engine
from engine.grammar import CompiledGrammar
from kvtransfer.leading_receiver import LeadingReceiver
from kvtransfer.leading_sender import LeadingSender
from kvtransfer.lease import LeaseTable
from kvtransfer.pages import pool_memory
from kvtransfer.receiver import Receiver
from kvtransfer.sender import Sender
from kvtransfer.ticket import layout_fingerprint
from prefill_worker.loop import PrefillLoop
from worker.attempts import Tombstones
from worker.engine_thread import EngineThread
from worker.watch import WatchPublisher

LEASE_S = 15.0
# Transfers are in memory: where nothing is heard of one for this long, nothing is going to be.
QUIET_S = 20.0


@dataclasses.dataclass
class Clock:
    """Time that passes only when a test says so."""

    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


class RecordingOutbox(Outbox):
    """Keeps all that was published."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[Token] = []
        self.updates: list[worker_pb2.RequestUpdate] = []
        self.scores: list[worker_pb2.PromptLogprobs] = []

    def publish(
        self,
        tokens: Iterable[tuple[Lane, worker_pb2.TokenOut]],
        updates: Iterable[tuple[Mailbox, worker_pb2.RequestUpdate]],
        scores: Iterable[tuple[Mailbox, worker_pb2.PromptLogprobs]] = (),
    ) -> None:
        tokens, updates, scores = list(tokens), list(updates), list(scores)
        self.tokens += [token_from_wire(token) for _, token in tokens]
        self.updates += [update for _, update in updates]
        self.scores += [score for _, score in scores]
        super().publish(tokens, updates, scores)

    def states(self, ref: AttemptRef) -> list[str]:
        """The states that an attempt went through, without their common prefix."""
        return [
            worker_pb2.RequestState.Name(update.state).removeprefix("REQUEST_STATE_")
            for update in self.updates
            if ref_from_wire(update.ref) == ref
        ]


def compiled_grammar(engine: Engine, spec: RequestSpec) -> CompiledGrammar | None:
    """The grammar of a request, as a worker's service has it compiled."""
    return None if spec.sampling.grammar is None else engine.grammars.compile(spec.sampling.grammar).result(10)


class Pair:
    """One prefill and one decode worker on the same checkpoint."""

    def __init__(
        self,
        model: pathlib.Path,
        *,
        block_size: Any = 16,
        prefill_blocks: int = 256,
        decode_blocks: int = 256,
        attention: Literal["reference", "cpu", "triton"] = "cpu",
        device: Literal["cpu", "cuda"] = "cpu",
        prefill: PrefillConfig | None = None,
        decode: DecodeConfig | None = None,
    ) -> None:
        self.clock = Clock()
        # One queue of commands for both loops: the test is the engine thread of both.
        self.thread = EngineThread("test")
        prefill = prefill or PrefillConfig()
        decode = decode or DecodeConfig()
        transfer = TransferConfig(transports=("loopback",), lease_s=LEASE_S, frame_bytes=4096)
        model_config = ModelConfig(path=str(model), attention=attention, device=device)

        def engine(num_blocks: int, chunk_tokens: int) -> Engine:
            roomy = CacheConfig(block_size=block_size, kv_cache_bytes=64 << 20)
            sized = load_engine(model_config, roomy, chunk_tokens=chunk_tokens)
            num_bytes = num_blocks * sized.layout.block_bytes
            cache = CacheConfig(block_size=block_size, kv_cache_bytes=num_bytes)
            return load_engine(model_config, cache, chunk_tokens=chunk_tokens, poison=True)

        self.prefill_engine = engine(prefill_blocks, prefill.max_batch_tokens)
        self.decode_engine = engine(decode_blocks, decode.prefill_chunk_tokens)
        self.fingerprint = layout_fingerprint(self.decode_engine.layout, model="test", revision="1")
        events = PostedEvents(self.thread.post)
        self.leader = LeadingReceiver(self.fingerprint, "decode-0", 1, transfer, events)
        self.receiver = Receiver(
            pool_memory(self.decode_engine.cache.kv),
            self.decode_engine.layout,
            self.fingerprint,
            "decode-0",
            1,
            transfer,
            TransferMetrics(CollectorRegistry()),
            self.leader,
        )
        self.receiver.listen("127.0.0.1")
        self.leader.lead([self.receiver], "unused:0")
        sender = Sender(
            pool_memory(self.prefill_engine.cache.kv),
            self.prefill_engine.layout,
            self.fingerprint,
            "prefill-0",
            2,
            transfer,
            TransferMetrics(CollectorRegistry()),
        )
        self.sender = LeadingSender(sender)
        self.outbox = RecordingOutbox()
        self.decode_leases = LeaseTable(LEASE_S, self.clock)
        self.prefill_leases = LeaseTable(LEASE_S, self.clock)
        self.prefill_metrics = SchedulerMetrics(CollectorRegistry())
        self.decode_metrics = SchedulerMetrics(CollectorRegistry())
        self.decode_watch = WatchPublisher()
        self.decode = DecodeLoop(
            self.decode_engine,
            self.leader,
            self.outbox,
            config=decode,
            leases=self.decode_leases,
            tombstones=Tombstones(LEASE_S, self.clock),
            watch=self.decode_watch,
            metrics=self.decode_metrics,
            clock=self.clock,
        )
        events.loop = self.decode
        self.prefill = PrefillLoop(
            self.prefill_engine,
            self.sender,
            config=prefill,
            leases=self.prefill_leases,
            tombstones=Tombstones(LEASE_S, self.clock),
            watch=WatchPublisher(),
            metrics=self.prefill_metrics,
            post=self.thread.post,
            clock=self.clock,
        )
        self.events: dict[AttemptRef, list[worker_pb2.PrefillEvent | BatonError]] = {}
        self._ids = itertools.count()

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()
        self.prefill_engine.grammars.close()
        self.decode_engine.grammars.close()

    # What a router would do

    def spec(
        self,
        prompt: Sequence[int],
        *,
        delivered: Sequence[Delivered] = (),
        request_id: str = "",
        attempt: int = 1,
        priority: int = 0,
        salt: str = "",
        timeout_s: float | None = None,
        max_unacked_tokens: int = 10_000,
        **sampling: Any,
    ) -> RequestSpec:
        """A spec as the router makes it; greedy unless `sampling` says otherwise."""
        root = root_hash("test", salt)
        return RequestSpec(
            ref=AttemptRef(request_id or f"r{next(self._ids)}", attempt),
            router_id="router",
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(**{"max_tokens": 8, "temperature": 0.0, **sampling}),
            delivered=tuple(delivered),
            block_hashes=tuple(extend_chain(root, prompt, self.decode_engine.layout.block_size)),
            salt_root=root,
            priority=priority,
            timeout_s=timeout_s,
            max_unacked_tokens=max_unacked_tokens,
        )

    def reserve(self, spec: RequestSpec, *, local_prefill: bool = False) -> transfer_pb2.Ticket:
        """Reserve, which must not be refused."""
        grammar = compiled_grammar(self.decode_engine, spec)
        response = self.decode.reserve(spec, local_prefill=local_prefill, grammar=grammar)
        assert response.HasField("ticket"), response
        return response.ticket

    def submit(self, spec: RequestSpec, ticket: transfer_pb2.Ticket) -> None:
        self.events[spec.ref] = []
        grammar = compiled_grammar(self.prefill_engine, spec)
        self.prefill.submit(spec, ticket, self.events[spec.ref].append, grammar=grammar)

    def start(self, spec: RequestSpec, *, local_prefill: bool = False) -> RequestSpec:
        """Send a request on its way."""
        ticket = self.reserve(spec, local_prefill=local_prefill)
        if not local_prefill:
            self.submit(spec, ticket)
        return spec

    # Driving

    def step_prefill(self) -> bool:
        self.thread.run_pending()
        return self.prefill.step()

    def step_decode(self) -> bool:
        self.thread.run_pending()
        return self.decode.step()

    def run(self, *, max_steps: int = 10_000) -> None:
        """Step both until neither holds anything; fails if that takes too long or they wait for nothing."""
        for _ in range(max_steps):
            busy = self.step_prefill() | self.step_decode()
            if self.prefill.is_idle and self.decode.is_idle:
                return
            if not busy:
                self._wait()
        raise AssertionError("the workers are still busy")

    def settle(self) -> None:
        """Wait until what was pushed has been answered, without a step of either loop."""
        while any(request.push is not None for request in self.prefill.requests):
            self._wait()
            self.thread.run_pending()

    def _wait(self) -> None:
        # A test's own time limit does not cover its fixtures' ends once the test has failed.
        if not self.thread.wait(QUIET_S):
            raise AssertionError("the workers hold requests that nothing happens to")

    # What came out

    def tokens(self, spec: RequestSpec, choice: int = 0) -> list[int]:
        """All tokens of a choice that the client would have: delivered ones, then those of both workers."""
        found = dict(enumerate(spec.forced_tokens(choice)))
        for token in [*self.first_tokens(spec), *self.outbox.tokens]:
            if token.ref == spec.ref and token.choice == choice:
                assert found.setdefault(token.position, token.token_id) == token.token_id
        assert sorted(found) == list(range(len(found)))
        return [found[position] for position in sorted(found)]

    def first_tokens(self, spec: RequestSpec) -> list[Token]:
        return [
            token_from_wire(token)
            for event in self.events.get(spec.ref, [])
            if isinstance(event, worker_pb2.PrefillEvent)
            for token in event.first_tokens.tokens
        ]

    def prompt_logprobs(self, spec: RequestSpec) -> list[Logprobs]:
        """Of the prompt's tokens from the second on, as whichever worker computed them sent them."""
        messages = [score for score in self.outbox.scores if ref_from_wire(score.ref) == spec.ref]
        messages += [
            event.prompt_logprobs
            for event in self.events.get(spec.ref, [])
            if isinstance(event, worker_pb2.PrefillEvent) and event.HasField("prompt_logprobs")
        ]
        found: list[Logprobs] = []
        for message in messages:
            assert message.start == len(found) + 1
            for at in message.positions:
                assert at.sampled.token_id == spec.prompt_token_ids[len(found) + 1]
                found.append(Logprobs(at.sampled.logprob, tuple((top.token_id, top.logprob) for top in at.top)))
        return found

    def error(self, spec: RequestSpec) -> BatonError | None:
        """How prefill failed, if it did."""
        return next((event for event in self.events[spec.ref] if isinstance(event, BatonError)), None)

    def assert_empty(self) -> None:
        """Nothing is held: every block is free in both pools, and the pools are consistent."""
        assert self.prefill.is_idle
        assert self.decode.is_idle
        for engine in (self.prefill_engine, self.decode_engine):
            engine.cache.pool.check()
            assert engine.cache.num_free == engine.cache.pool.num_usable


MakePair = Callable[..., Pair]


def finish_alone(pair: Pair, prompt: list[int], **sampling: Any) -> list[list[int]]:
    """The tokens of each choice of a request that has the workers to itself."""
    spec = pair.start(pair.spec(prompt, **sampling))
    pair.run()
    return [pair.tokens(spec, choice) for choice in range(spec.sampling.n)]
