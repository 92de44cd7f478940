"""A prefill worker without a model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Protocol

import grpc
import grpc.aio

from baton.internal.v1 import worker_pb2, worker_pb2_grpc
from baton.wire import spec_from_wire
from bench.mock_workers.worker import Context, Name, Names, Script, Worker, make_scores, make_token, open_gate


class CommitTarget(Protocol):
    """The decode worker of a ticket: a mock one, or one that a benchmark brings."""

    def commit(self, name: Name, first_tokens: Iterable[worker_pb2.TokenOut]) -> None: ...

    def abort(self, name: Name) -> None: ...


class MockPrefill(Worker):
    """Answers with the script's first tokens and tells the ticket's decode worker that all has arrived."""

    role = "prefill"

    def __init__(self, name: str, epoch: int, script: Script, names: Names, *, total_blocks: int = 64) -> None:
        self.requests: list[worker_pb2.PrefillRequest] = []
        self.peers: dict[str, CommitTarget] = {}
        self.cached_tokens = 0
        # Each Prefill call takes one: (events to send before failing, the status).
        self.failures: list[tuple[int, grpc.StatusCode]] = []
        self.first_gate = open_gate()
        self.commit_gate = open_gate()
        self.done_gate = open_gate()
        super().__init__(name, epoch, script, names, total_blocks=total_blocks)

    async def Prefill(  # noqa: N802
        self, request: worker_pb2.PrefillRequest, context: Context
    ) -> AsyncIterator[worker_pb2.PrefillEvent]:
        self.requests.append(request)
        self._changed.set()
        num_events, status = self.failures.pop(0) if self.failures else (-1, grpc.StatusCode.OK)
        try:
            async for event in self._events(request):
                if num_events == 0:
                    await context.abort(status, "scripted failure")
                num_events -= 1
                yield event
        except asyncio.CancelledError:
            self.on_cancel(self.name_of(request.spec.ref))
            raise

    def _add_to(self, server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_PrefillWorkerServicer_to_server(self, server)  # type: ignore[arg-type]

    async def _events(self, request: worker_pb2.PrefillRequest) -> AsyncIterator[worker_pb2.PrefillEvent]:
        spec = spec_from_wire(request.spec)
        yield worker_pb2.PrefillEvent(started=worker_pb2.PrefillStarted(cached_tokens=self.cached_tokens))
        for scores in make_scores(spec):
            yield worker_pb2.PrefillEvent(prompt_logprobs=scores)
        await self.first_gate.wait()
        tokens = [make_token(spec, choice, spec.first_position, self.script) for choice in spec.sampled_choices]
        yield worker_pb2.PrefillEvent(first_tokens=worker_pb2.PrefillFirstTokens(tokens=tokens, prefill_s=0.125))
        await self.commit_gate.wait()
        peer = self.peers[request.ticket.worker]
        committed = spec.sampling.n != len(tokens) or not all(token.finish_reason for token in tokens)
        if committed:
            peer.commit(self.name_of(spec.ref), tokens)
        else:
            peer.abort(self.name_of(spec.ref))
        await self.done_gate.wait()
        done = worker_pb2.PrefillDone(committed=committed, transfer_s=0.5, bytes=1, transport="mock")
        yield worker_pb2.PrefillEvent(done=done)
