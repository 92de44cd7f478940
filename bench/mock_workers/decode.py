"""A decode worker without a model."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
import grpc.aio

from baton.internal.v1 import transfer_pb2, worker_pb2, worker_pb2_grpc
from baton.requests import RequestSpec
from baton.wire import ref_to_wire, spec_from_wire
from bench.mock_workers.worker import (
    BLOCK_SIZE,
    FIRST_GROUP,
    Context,
    Name,
    Names,
    Script,
    Worker,
    make_scores,
    make_token,
    open_gate,
)


@dataclasses.dataclass
class Reservation:
    """One request at a mock decode worker."""

    spec: RequestSpec
    next_position: list[int]
    finished: list[bool]
    local: bool = False
    committed: bool = False
    announced: bool = False
    acked: list[int] = dataclasses.field(default_factory=list)
    unacked: dict[tuple[int, int], worker_pb2.TokenOut] = dataclasses.field(default_factory=dict)

    def num_unacked(self, choice: int) -> int:
        return self.next_position[choice] - self.acked[choice]


class MockDecode(Worker):
    """Grants every reservation (unless told to refuse) and emits one token a step for each committed choice.

    Args:
        reports_load: sends its state after each step, with the prompts' blocks as cached ones, as a real worker does.
    """

    role = "decode"

    def __init__(
        self,
        name: str,
        epoch: int,
        script: Script,
        names: Names,
        *,
        step_s: float = 0.0,
        total_blocks: int = 64,
        reports_load: bool = False,
    ) -> None:
        self.reservations: dict[Name, Reservation] = {}
        self.reserves: list[worker_pb2.ReserveRequest] = []
        self.hellos: list[worker_pb2.AttachHello] = []
        self.acks: list[tuple[Name, int, int]] = []
        self.num_ack_messages = 0
        self.refusals = 0
        self.cached_tokens = 0
        self.accepts_attach = True
        self.sends_finished = True
        # Choices that the router has ended.
        self.ended: list[tuple[Name, int]] = []
        self.reserve_gate = open_gate()
        self.step_gate = open_gate()
        self.step_s = step_s
        self._reports_load = reports_load
        self._decoding: dict[Name, Reservation] = {}
        self._fresh: list[bytes] = []
        # Oldest first.
        self._cached: collections.OrderedDict[bytes, None] = collections.OrderedDict()
        self._outputs: dict[str, asyncio.Queue[worker_pb2.StepOutput | None]] = {}
        self._work = asyncio.Event()
        self._engine: asyncio.Task[None] | None = None
        super().__init__(name, epoch, script, names, total_blocks=total_blocks)

    async def start(self) -> None:
        await super().start()
        self._engine = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._engine is not None:
            self._engine.cancel()
            await asyncio.gather(self._engine, return_exceptions=True)
        await super().stop()

    def break_attach(self) -> None:
        """Ends every Attach call with an error; tokens are kept."""
        for queue in self._outputs.values():
            queue.put_nowait(None)

    def commit(self, name: Name, first_tokens: Iterable[worker_pb2.TokenOut] = ()) -> None:
        """The KV is here: decoding goes on after the first tokens."""
        reservation = self.reservations.get(name)
        if reservation is None:
            return
        for token in first_tokens:
            reservation.next_position[token.choice] = reservation.acked[token.choice] = token.position + 1
            reservation.finished[token.choice] = bool(token.finish_reason)
        reservation.committed = True
        self._fresh += [block_hash + FIRST_GROUP for block_hash in reservation.spec.block_hashes]
        self._decoding[name] = reservation
        self._work.set()

    def abort(self, name: Name) -> None:
        """The prefill worker has nothing to send."""
        self._drop(name)

    def preempt(self, name: Name) -> None:
        self._send_update(self._drop(name), state=worker_pb2.REQUEST_STATE_PREEMPTED)

    def fail(self, name: Name, status: str, message: str) -> None:
        self._send_update(self._drop(name), state=worker_pb2.REQUEST_STATE_FAILED, status=status, message=message)

    async def Reserve(  # noqa: N802
        self, request: worker_pb2.ReserveRequest, context: Context
    ) -> worker_pb2.ReserveResponse:
        self.reserves.append(request)
        self._changed.set()
        await self.reserve_gate.wait()
        if self.refusals:
            self.refusals -= 1
            return worker_pb2.ReserveResponse(refusal=worker_pb2.Refusal(reason="no room", needed_blocks=9))
        spec = spec_from_wire(request.spec)
        name = self.name_of(spec.ref)
        if name in self.cancelled:
            await context.abort(grpc.StatusCode.CANCELLED, "cancelled before")
        positions = [len(spec.forced_tokens(choice)) for choice in range(spec.sampling.n)]
        finished = [bool(spec.delivered) and spec.delivered[choice].finished for choice in range(spec.sampling.n)]
        self.reservations[name] = Reservation(
            spec, positions, finished, acked=list(positions), local=request.local_prefill
        )
        if request.local_prefill:
            self.commit(name)
        ticket = transfer_pb2.Ticket(
            ref=request.spec.ref, reservation=len(self.reserves), worker=self.name, epoch=self.epoch
        )
        return worker_pb2.ReserveResponse(ticket=ticket)

    async def Attach(  # noqa: N802
        self, requests: AsyncIterator[worker_pb2.AttachRequest], context: Context
    ) -> AsyncIterator[worker_pb2.StepOutput]:
        hello = (await anext(requests)).hello
        self.hellos.append(hello)
        self._changed.set()
        if not self.accepts_attach:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not accepting")
        if hello.epoch != self.epoch:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"epoch is {self.epoch}")
        queue = self._outputs[hello.router_id] = asyncio.Queue()
        queue.put_nowait(self._resume(hello))
        reader = asyncio.create_task(self._read(requests))
        try:
            while (output := await queue.get()) is not None:
                yield output
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            if self._outputs.get(hello.router_id) is queue:
                del self._outputs[hello.router_id]
        await context.abort(grpc.StatusCode.UNAVAILABLE, "attach broken")

    def on_cancel(self, name: Name) -> None:
        self._drop(name)
        super().on_cancel(name)

    def _add_to(self, server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_DecodeWorkerServicer_to_server(self, server)  # type: ignore[arg-type]

    async def _read(self, requests: AsyncIterator[worker_pb2.AttachRequest]) -> None:
        async for request in requests:
            self.num_ack_messages += bool(request.acks)
            for cursor in request.acks:
                self._acknowledge(cursor)
            for ref in request.cancels:
                self.on_cancel(self.name_of(ref))
            self._changed.set()

    def _resume(self, hello: worker_pb2.AttachHello) -> worker_pb2.StepOutput:
        output = worker_pb2.StepOutput()
        for cursor in hello.cursors:
            reservation = self.reservations.get(self.name_of(cursor.ref))
            if reservation is not None:
                output.tokens.extend(
                    token
                    for (choice, position), token in reservation.unacked.items()
                    if choice == cursor.choice and position >= cursor.position
                )
        return output

    def _acknowledge(self, cursor: worker_pb2.Cursor) -> None:
        name = self.name_of(cursor.ref)
        self.acks.append((name, cursor.choice, cursor.position))
        reservation = self.reservations.get(name)
        if reservation is None:
            return
        choice = cursor.choice
        if cursor.ended:
            self.ended.append((name, choice))
            reservation.finished[choice] = True
        for position in range(reservation.acked[choice], cursor.position):
            reservation.unacked.pop((choice, position), None)
        reservation.acked[choice] = max(reservation.acked[choice], cursor.position)
        self._work.set()

    async def _run(self) -> None:
        """The engine: a token for every choice that may go on, all in one message for each router."""
        while True:
            await self.step_gate.wait()
            if not self._step():
                self._work.clear()
                await self._work.wait()
            await asyncio.sleep(self.step_s)

    def _step(self) -> bool:
        outputs: dict[str, worker_pb2.StepOutput] = {}
        for name, reservation in list(self._decoding.items()):
            if not all(reservation.finished):
                output = outputs.setdefault(reservation.spec.router_id, worker_pb2.StepOutput())
                self._step_request(reservation, output)
            if all(reservation.finished):
                del self._decoding[name]
        worked = False
        for router_id, output in outputs.items():
            if output.tokens:
                worked = True
                if (queue := self._outputs.get(router_id)) is not None:
                    queue.put_nowait(output)
        if self._reports_load:
            self._report_load()
        self._changed.set()
        return worked

    def _report_load(self) -> None:
        """What a real worker tells after a step: blocks that are taken, and which of them came and went as cached."""
        stored, self._fresh = self._fresh, []
        for key in stored:
            self._cached[key] = None
        removed = [self._cached.popitem(last=False)[0] for _ in range(len(self._cached) - self.state.total_blocks)]
        taken = sum(
            -(-(len(each.spec.prompt_token_ids) + max(each.next_position)) // BLOCK_SIZE)
            for each in self._decoding.values()
        )
        free_blocks = max(self.state.total_blocks - taken, 0)
        self.publish(stored, removed, running=len(self._decoding), free_blocks=free_blocks)

    def _drop(self, name: Name) -> Reservation | None:
        self._decoding.pop(name, None)
        return self.reservations.pop(name, None)

    def _step_request(self, reservation: Reservation, output: worker_pb2.StepOutput) -> None:
        spec, ref = reservation.spec, ref_to_wire(reservation.spec.ref)
        for choice in range(spec.sampling.n):
            if reservation.finished[choice] or reservation.num_unacked(choice) >= spec.max_unacked_tokens:
                continue
            position = reservation.next_position[choice]
            token = make_token(spec, choice, position, self.script)
            reservation.unacked[choice, position] = token
            reservation.next_position[choice] += 1
            reservation.finished[choice] = bool(token.finish_reason)
            output.tokens.append(token)
        # A local prefill whose first tokens end the request is over before it decodes.
        over = all(reservation.finished)
        states = [] if reservation.announced or (over and reservation.local) else [worker_pb2.REQUEST_STATE_DECODING]
        if reservation.local and not reservation.announced:
            output.prompt_logprobs.extend(make_scores(spec))
        reservation.announced = True
        if over and self.sends_finished:
            states.append(worker_pb2.REQUEST_STATE_FINISHED)
        for state in states:
            output.updates.add(
                ref=ref,
                state=state,
                first_decode_step_s=0.002,
                local_prefill_s=0.003,
                cached_tokens=self.cached_tokens,
                decode_s=0.25,
            )

    def _send_update(self, reservation: Reservation | None, **fields: Any) -> None:
        assert reservation is not None
        update = worker_pb2.RequestUpdate(ref=ref_to_wire(reservation.spec.ref), **fields)
        self._outputs[reservation.spec.router_id].put_nowait(worker_pb2.StepOutput(updates=[update]))
