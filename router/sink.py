"""Where a request's responses go: into its client's connection, from whoever reads its tokens off a worker's stream.

No task stands between the two, since waking one for each token would cost more than all else that a token needs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, Protocol, TypeVar

from baton.v1 import inference_pb2
from router.batch import WriteBatch
from router.token_message import encode_request_id, encode_token

_Item = TypeVar("_Item")


class Sink(Protocol):
    """Takes the responses of one request, in their order."""

    @property
    def ready(self) -> bool:
        """Whether it takes another one now: false while the client is behind."""
        ...

    def send(self, response: inference_pb2.GenerateResponse) -> None:
        """Takes a response, when it is ready; never waits. Raises what broke the connection."""
        ...

    def send_token(self, request_id: str, choice: int, text: str, token_id: int) -> None:
        """As `send`, of a response that has one token with nothing more to tell: what nearly all are."""
        ...

    async def drain(self) -> None:
        """Returns when it is ready again."""
        ...


def token_response(request_id: str, choice: int, text: str, token_id: int) -> inference_pb2.GenerateResponse:
    """The response that `Sink.send_token` is short for."""
    response = inference_pb2.GenerateResponse(request_id=request_id)
    response.choices.add(index=choice, text=text, token_ids=(token_id,))
    return response


class ResponseSink:
    """Writes the responses of one request as protobuf."""

    __slots__ = ("_request_id", "_writer")

    def __init__(self, writer: Writer[bytes]) -> None:
        self._writer = writer
        self._request_id = b""

    @property
    def ready(self) -> bool:
        return self._writer.ready

    def send(self, response: inference_pb2.GenerateResponse) -> None:
        self._writer.send(response.SerializeToString())

    def send_token(self, request_id: str, choice: int, text: str, token_id: int) -> None:
        if not self._request_id:
            self._request_id = encode_request_id(request_id)
        self._writer.send(self._request_id + encode_token(choice, text, token_id))

    async def drain(self) -> None:
        await self._writer.drain()


class Writer(Generic[_Item]):
    """Calls a connection's `write` without a task, one item at a time.

    Each call runs at once as far as it gets without waiting, nearly always to its end or to where the network has the
    item; what it waits for then resumes it.

    Args:
        write: takes one item; waits while the client is behind.
        write_now: tried first: takes an item and returns true, unless the item would have to wait.
        batch: where calls of `write` begin; without one they do at once.
    """

    __slots__ = ("_batch", "_call", "_error", "_write", "_write_now", "_written")

    def __init__(
        self,
        write: Callable[[_Item], Coroutine[Any, Any, None]],
        *,
        write_now: Callable[[_Item], bool] | None = None,
        batch: WriteBatch | None = None,
    ) -> None:
        self._write = write
        self._write_now = write_now
        self._batch = batch
        self._call: Coroutine[Any, Any, None] | None = None
        self._error: BaseException | None = None
        self._written: asyncio.Event | None = None

    @property
    def ready(self) -> bool:
        return self._call is None

    def send(self, item: _Item) -> None:
        assert self._call is None, "not ready"
        if self._error is not None:
            raise self._error
        if self._write_now is not None and self._write_now(item):
            return
        self._call = self._write(item)
        if self._batch is None:
            self._go_on()
        else:
            self._batch.add(self._go_on)

    async def drain(self) -> None:
        while self._call is not None:
            if self._written is None:
                self._written = asyncio.Event()
            await self._written.wait()

    def _go_on(self, _: asyncio.Future[Any] | None = None) -> None:
        """Runs the call to its end, or to what it waits for."""
        assert self._call is not None
        try:
            awaited: asyncio.Future[Any] = self._call.send(None)
        except StopIteration:
            self._end()
        except (Exception, asyncio.CancelledError) as error:
            # Whoever sends the next item is told; where there is none, the connection's own reader sees that it broke.
            self._error = error
            self._end()
        else:
            awaited.add_done_callback(self._go_on)

    def _end(self) -> None:
        self._call = None
        if self._written is not None:
            self._written.set()
            self._written = None
