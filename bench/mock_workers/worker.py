"""What both mock roles share, and what they say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import grpc
import grpc.aio

from baton.internal.v1 import transfer_pb2, worker_pb2
from baton.requests import AttemptRef, FinishReason, RequestSpec
from baton.v1 import inference_pb2
from baton.wire import ref_to_wire

BLOCK_SIZE = 16
# What follows the hash of a cached block in the Watch stream.
FIRST_GROUP = bytes(4)
Context = grpc.aio.ServicerContext[Any, Any]
# (choice, position) -> token id
Script = Callable[[int, int], int]
# (request, counted from 0 in the order in which the cluster heard of them; attempt)
Name = tuple[int, int]


def fingerprint() -> transfer_pb2.LayoutFingerprint:
    return transfer_pb2.LayoutFingerprint(
        model="mock",
        revision="r1",
        dtype="float32",
        codec="raw",
        block_size=BLOCK_SIZE,
        num_layers=2,
        num_kv_heads=2,
        head_dim=8,
        groups=["full:0,1"],
    )


class Names:
    """Numbers the requests of a cluster, since the router makes up what they are called there."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def __call__(self, ref: AttemptRef | transfer_pb2.AttemptRef) -> Name:
        return self._numbers.setdefault(ref.request_id, len(self._numbers)), ref.attempt


class Worker:
    """What both mock roles share: a server, the Watch stream, leases, and waiting for conditions."""

    role = ""

    def __init__(self, name: str, epoch: int, script: Script, names: Names, *, total_blocks: int = 64) -> None:
        self.name = name
        self.epoch = epoch
        self.script = script
        self.name_of = names
        self.state = worker_pb2.WorkerState(free_blocks=total_blocks, total_blocks=total_blocks, token_credit=100_000)
        self.hashes: set[bytes] = set()
        self.cancelled: list[Name] = []
        self.renewed: list[Name] = []
        self.forgotten: set[Name] = set()
        self.num_watches = 0
        self._watchers: list[asyncio.Queue[worker_pb2.WorkerState | None]] = []
        self._changed = asyncio.Event()
        self._server = grpc.aio.server()
        self._add_to(self._server)
        self._port = self._server.add_insecure_port("127.0.0.1:0")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def info(self) -> worker_pb2.WorkerInfo:
        return worker_pb2.WorkerInfo(
            role=self.role,
            name=self.name,
            epoch=self.epoch,
            address=self.address,
            metrics_address=f"{self.name}.example:9000",
            architecture="MockForCausalLM",
            dtype="float32",
            vocab_size=300,
            max_model_len=512,
            block_size=BLOCK_SIZE,
            total_blocks=self.state.total_blocks,
            layout=fingerprint(),
            max_sequence_tokens=(self.state.total_blocks - 1) * BLOCK_SIZE,
        )

    async def start(self) -> None:
        await self._server.start()

    async def stop(self) -> None:
        """Like a death: every call breaks, and nobody listens any more."""
        await self._server.stop(None)

    async def until(self, condition: Callable[[], object], timeout_s: float = 10.0) -> None:
        """Returns when the condition holds; it is looked at after everything that happens to this worker."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def publish(self, stored: Iterable[bytes] = (), removed: Iterable[bytes] = (), **changes: Any) -> None:
        """Sends a new state to all watchers."""
        for name, value in changes.items():
            setattr(self.state, name, value)
        self.hashes = (self.hashes | set(stored)) - set(removed)
        for watcher in self._watchers:
            message = worker_pb2.WorkerState()
            message.CopyFrom(self.state)
            message.stored.extend(stored)
            message.removed.extend(removed)
            watcher.put_nowait(message)

    def break_watch(self) -> None:
        for watcher in self._watchers:
            watcher.put_nowait(None)

    def skip_sequence(self) -> None:
        """Loses a state on its way: the next one leaves a gap."""
        for watcher in self._watchers:
            watcher.put_nowait(worker_pb2.WorkerState(sequence=1))

    async def Watch(self, request: worker_pb2.WatchRequest, context: Context) -> AsyncIterator[worker_pb2.WorkerState]:  # noqa: N802
        self.num_watches += 1
        queue: asyncio.Queue[worker_pb2.WorkerState | None] = asyncio.Queue()
        first = worker_pb2.WorkerState(snapshot=True, stored=self.hashes)
        first.MergeFrom(self.state)
        queue.put_nowait(first)
        self._watchers.append(queue)
        self._changed.set()
        sequence = 1
        try:
            while (state := await queue.get()) is not None:
                if state.sequence:
                    sequence += 1
                    continue
                state.sequence = sequence
                sequence += 1
                yield state
        finally:
            self._watchers.remove(queue)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "watch broken")

    async def RenewLeases(  # noqa: N802
        self, request: worker_pb2.RenewLeasesRequest, context: Context
    ) -> worker_pb2.RenewLeasesResponse:
        self.renewed += map(self.name_of, request.refs)
        self._changed.set()
        return worker_pb2.RenewLeasesResponse(
            unknown=[ref for ref in request.refs if self.name_of(ref) in self.forgotten]
        )

    async def Cancel(self, request: worker_pb2.CancelRequest, context: Context) -> worker_pb2.CancelResponse:  # noqa: N802
        for ref in request.refs:
            self.on_cancel(self.name_of(ref))
        return worker_pb2.CancelResponse()

    def on_cancel(self, name: Name) -> None:
        self.cancelled.append(name)
        self._changed.set()

    def _add_to(self, server: grpc.aio.Server) -> None:
        raise AssertionError


def make_token(spec: RequestSpec, choice: int, position: int, script: Script) -> worker_pb2.TokenOut:
    """What a real worker would send, with its finish reason and scripted logprobs if asked for."""
    token_id = script(choice, position)
    reason: FinishReason = spec.sampling.finish_reason(token_id, position + 1)
    token = worker_pb2.TokenOut(
        ref=ref_to_wire(spec.ref),
        choice=choice,
        position=position,
        token_id=token_id,
        finish_reason=inference_pb2.FinishReason.ValueType(int(reason)),
    )
    if spec.sampling.logprobs is not None:
        token.logprobs.sampled.token_id = token_id
        token.logprobs.sampled.logprob = -0.5
        for rank in range(spec.sampling.logprobs):
            token.logprobs.top.add(token_id=rank, logprob=-1.0 - rank)
    return token


def make_scores(spec: RequestSpec) -> list[worker_pb2.PromptLogprobs]:
    """Scripted logprobs of the prompt if asked for, in two messages: of each token the negative of its position."""
    if spec.sampling.prompt_logprobs is None:
        return []
    middle = max(2, len(spec.prompt_token_ids) // 2)
    return [
        worker_pb2.PromptLogprobs(
            ref=ref_to_wire(spec.ref),
            start=start,
            positions=[
                inference_pb2.PositionLogprobs(
                    sampled=inference_pb2.TokenLogprob(token_id=spec.prompt_token_ids[position], logprob=-position)
                )
                for position in range(start, end)
            ],
        )
        for start, end in ((1, middle), (middle, len(spec.prompt_token_ids)))
    ]


def open_gate() -> asyncio.Event:
    gate = asyncio.Event()
    gate.set()
    return gate
