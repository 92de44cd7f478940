"""Runs the prompts of one HTTP request through the pipeline, all at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from baton.errors import InternalError
from baton.v1 import inference_pb2
from router.sink import Sink, Writer, token_response

# Called with the index of a request and one of its responses.
Keep = Callable[[int, inference_pb2.GenerateResponse], None]


class FormatsEvents(Protocol):
    """What writes the events of an answer; the first argument is the index of the prompt."""

    def events(self, prompt_index: int, response: inference_pb2.GenerateResponse) -> bytes:
        """One event for each token of a response."""
        ...

    def token_event(self, prompt_index: int, choice: int, text: str, token_id: int) -> bytes:
        """The event of a token with nothing more to tell."""
        ...


class Generates(Protocol):
    """What this API needs of `router.pipeline.Pipeline`."""

    async def generate(
        self, request: inference_pb2.GenerateRequest, sink: Sink, timeout_s: float | None = None
    ) -> None:
        """Sends the responses of one request; cancelling its task releases what it holds."""
        ...


class KeepingSink:
    """Keeps the responses of one request; a client that waits for the whole is never behind."""

    ready = True

    def __init__(self, index: int, keep: Keep) -> None:
        self._index = index
        self._keep = keep

    def send(self, response: inference_pb2.GenerateResponse) -> None:
        self._keep(self._index, response)

    def send_token(self, request_id: str, choice: int, text: str, token_id: int) -> None:
        self.send(token_response(request_id, choice, text, token_id))

    async def drain(self) -> None:
        """Nothing is on its way."""


class EventSink:
    """Writes the responses of one request as events to a connection that others may share."""

    __slots__ = ("_answer", "_index", "_writer")

    def __init__(self, index: int, answer: FormatsEvents, writer: Writer[bytes]) -> None:
        self._index = index
        self._answer = answer
        self._writer = writer

    @property
    def ready(self) -> bool:
        return self._writer.ready

    def send(self, response: inference_pb2.GenerateResponse) -> None:
        if events := self._answer.events(self._index, response):
            self._writer.send(events)

    def send_token(self, request_id: str, choice: int, text: str, token_id: int) -> None:
        self._writer.send(self._answer.token_event(self._index, choice, text, token_id))

    async def drain(self) -> None:
        await self._writer.drain()


async def generate_all(
    pipeline: Generates,
    requests: Sequence[inference_pb2.GenerateRequest],
    sink_of: Callable[[int], Sink],
    timeout_s: float | None,
) -> None:
    """Generates for all requests, the responses of each into the sink of its index.

    The first request that fails ends all. Cancelling the task releases everything.

    Raises:
        BatonError: whatever ended a request early.
    """
    if len(requests) == 1:
        await pipeline.generate(requests[0], sink_of(0), timeout_s)
        return
    tasks = [
        asyncio.create_task(_generate_one(pipeline, request, sink_of(index), timeout_s))
        for index, request in enumerate(requests)
    ]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _generate_one(
    pipeline: Generates, request: inference_pb2.GenerateRequest, sink: Sink, timeout_s: float | None
) -> None:
    """One of several requests; what ends it early is an Exception, unless its task is cancelled."""
    try:
        await pipeline.generate(request, sink, timeout_s)
    except (asyncio.CancelledError, KeyboardInterrupt, SystemExit) as error:
        task = asyncio.current_task()
        assert task is not None
        if task.cancelling() or not isinstance(error, asyncio.CancelledError):
            raise
        raise InternalError("what the request waited for was cancelled") from error
    except Exception:
        raise
    except BaseException as error:
        # As a library in Rust raises where it panics.
        raise InternalError(f"{type(error).__name__}: {error}") from error
