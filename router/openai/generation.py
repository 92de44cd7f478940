"""Runs the prompts of one HTTP request through the pipeline, all at the same time, as one stream of responses."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from baton.errors import InternalError
from baton.v1 import inference_pb2

# Responses of all prompts that the client has not taken; more wait, and with them their workers.
_MAX_AHEAD = 8

Response = tuple[int, inference_pb2.GenerateResponse]


class Generates(Protocol):
    """What this API needs of `router.pipeline.Pipeline`."""

    def generate(
        self, request: inference_pb2.GenerateRequest, timeout_s: float | None = None
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """The responses of one request; closing the iterator releases what it holds."""
        ...


async def generate_all(
    pipeline: Generates, requests: Sequence[inference_pb2.GenerateRequest], timeout_s: float | None
) -> AsyncGenerator[Response, None]:
    """(index of the request, response), those of each request in order.

    The first request that fails ends all. Closing the iterator releases everything; it must be closed by the task that
    iterates it.

    Raises:
        BatonError: whatever ended a request early.
    """
    if len(requests) == 1:
        async with contextlib.aclosing(pipeline.generate(requests[0], timeout_s)) as responses:
            async for response in responses:
                yield 0, response
        return
    ready: asyncio.Queue[Response | Exception | None] = asyncio.Queue(_MAX_AHEAD)
    tasks = [
        asyncio.create_task(_pump(pipeline.generate(request, timeout_s), index, ready))
        for index, request in enumerate(requests)
    ]
    try:
        num_running = len(tasks)
        while num_running:
            item = await ready.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(
    responses: AsyncGenerator[inference_pb2.GenerateResponse, None],
    index: int,
    ready: asyncio.Queue[Response | Exception | None],
) -> None:
    """Passes on one request's responses, then None, or what ended it early."""
    end: Exception | None = None
    try:
        async with contextlib.aclosing(responses):
            async for response in responses:
                await ready.put((index, response))
    except Exception as error:
        end = error
    except (asyncio.CancelledError, KeyboardInterrupt, SystemExit) as error:
        task = asyncio.current_task()
        assert task is not None
        if task.cancelling() or not isinstance(error, asyncio.CancelledError):
            raise
        # Not this task was cancelled, but something that it waited for.
        end = InternalError("what the request waited for was cancelled")
    except BaseException as error:
        # As a library in Rust raises where it panics.
        end = InternalError(f"{type(error).__name__}: {error}")
    await ready.put(end)
