"""What happens on the connection: hanging up, slow readers, order of messages."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.router.openai.conftest import Http
from tests.router.openai.fake_pipeline import answer, words


class Connection:
    """A client of the ASGI application that reads and hangs up when a test says so."""

    def __init__(self, http: Http, path: str, **body: Any) -> None:
        self._messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
        self.hung_up = asyncio.Event()
        self.reading = asyncio.Event()
        self.reading.set()
        self.sent: list[Any] = []
        self.writing = asyncio.Event()
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        self.task = asyncio.ensure_future(http.app(scope, self._receive, self._send))

    async def _receive(self) -> Any:
        if self._messages:
            return self._messages.pop()
        await self.hung_up.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.writing.set()
        await self.reading.wait()
        self.sent.append(message)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["hello", ["hello", "world"]])
async def test_hanging_up_closes_all_that_runs(http: Http, stream: bool, prompt: object) -> None:
    http.pipeline.gate.clear()
    client = Connection(http, "/v1/completions", prompt=prompt, stream=stream)
    await http.pipeline.waiting.wait()
    client.hung_up.set()
    await client.task
    assert http.pipeline.closed == len(http.pipeline.requests)
    assert not any(message.get("more_body") is False for message in client.sent)


async def test_hanging_up_while_a_chunk_is_written_closes_it_too(http: Http) -> None:
    client = Connection(http, "/v1/completions", prompt="hello", stream=True)
    client.reading.clear()
    await client.writing.wait()
    client.hung_up.set()
    await client.task
    assert http.pipeline.closed == 1


async def test_a_slow_reader_is_waited_for(http: Http) -> None:
    http.pipeline.script = lambda request: answer(*words("a" * 300))
    slow = Connection(http, "/v1/completions", prompt="hello", stream=True)
    slow.reading.clear()
    quick = Connection(http, "/v1/completions", prompt="hello", stream=True)
    await quick.task
    assert http.pipeline.given == 101
    slow.reading.set()
    await slow.task
    assert http.pipeline.given == 200
    assert [message["body"] for message in slow.sent if "body" in message][-1] == b"data: [DONE]\n\n"


async def test_slow_readers_of_many_prompts_are_waited_for(http: Http) -> None:
    http.pipeline.script = lambda request: answer(*words("a" * 300))
    slow = Connection(http, "/v1/completions", prompt=["a", "b"], stream=True)
    slow.reading.clear()
    await Connection(http, "/v1/completions", prompt="hello", stream=True).task
    assert http.pipeline.given < 100 + 20
    slow.hung_up.set()
    await slow.task
    assert http.pipeline.closed == 3


async def test_the_status_goes_out_with_the_first_token(http: Http) -> None:
    client = Connection(http, "/v1/completions", prompt="hello", stream=True)
    await client.task
    start, first, *_ = client.sent
    assert start["type"] == "http.response.start"
    headers = dict(start["headers"])
    assert headers[b"cache-control"] == b"no-cache"
    assert headers[b"x-accel-buffering"] == b"no"
    assert b"content-length" not in headers
    assert first["body"].startswith(b"data: {")
    assert first["body"].isascii()
    assert [message.get("more_body") for message in client.sent[1:]] == [True, True, True, False]
