"""The clients that users bring, unchanged, against a real cluster: OpenAI's packages and load generators."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from baton.client import Client
from tests.cluster import load_client
from tests.cluster.harness import ClusterUnderTest
from tests.cluster.inprocess import assert_idle
from tests.tools import NODE_FOLDER, node

STORY = "Once upon a time"
QUESTION: list[Any] = [{"role": "user", "content": "what is 12+7?"}]
SCHEMA = {
    "type": "object",
    "properties": {"total": {"enum": [19, 20]}},
    "required": ["total"],
    "additionalProperties": False,
    # The demo model would fill every gap that it may.
    "x-guidance": {"whitespace_flexible": False},
}
TOOL: Any = {"type": "function", "function": {"name": "add", "parameters": SCHEMA}}


@pytest.fixture
def idle(demo_cluster: ClusterUnderTest) -> Iterator[Client]:
    """Baton's own client; after the test every block of every pool must be free."""
    with Client(demo_cluster.target) as client:
        yield client
        assert_idle(client)


@pytest.fixture
def sync(demo_cluster: ClusterUnderTest, idle: Client) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo_cluster.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def aio(demo_cluster: ClusterUnderTest, idle: Client) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{demo_cluster.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def http(demo_cluster: ClusterUnderTest, idle: Client) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=demo_cluster.url, timeout=60, limits=limits) as client:
        yield client


class TestPython:
    def test_models(self, sync: openai.OpenAI) -> None:
        assert [model.id for model in sync.models.list()] == ["demo"]
        assert sync.models.retrieve("demo").owned_by == "baton"

    def test_the_text_is_that_of_grpc(self, sync: openai.OpenAI, idle: Client) -> None:
        expected = idle.generate(STORY, max_tokens=40, temperature=0.0)
        whole = sync.completions.create(model="demo", prompt=STORY, max_tokens=40, temperature=0)
        stream = sync.completions.create(model="demo", prompt=STORY, max_tokens=40, temperature=0, stream=True)
        texts = [event.choices[0].text for event in stream]
        assert whole.choices[0].text == "".join(texts) == expected.text
        assert len(texts) == 40
        assert whole.choices[0].finish_reason == "length"
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 40

    def test_chats(self, sync: openai.OpenAI) -> None:
        whole = sync.chat.completions.create(model="demo", messages=QUESTION, temperature=0)
        assert (whole.choices[0].message.content or "").strip() == "19"
        with sync.chat.completions.stream(model="demo", messages=QUESTION, temperature=0) as stream:
            streamed = stream.get_final_completion()
        assert streamed.choices[0].message.content == whole.choices[0].message.content
        assert streamed.choices[0].finish_reason == "stop"

    def test_many_prompts_of_either_kind(self, sync: openai.OpenAI) -> None:
        tokens = [[0, 284, 27, 503], [0, 284]]
        texts = sync.completions.create(model="demo", prompt=["12+7=", "1+1="], n=2, max_tokens=8, temperature=0)
        assert [(choice.index, choice.text) for choice in texts.choices] == [(0, "19"), (1, "19"), (2, "2"), (3, "2")]
        ids = sync.completions.create(model="demo", prompt=tokens, max_tokens=2, temperature=0)
        assert [choice.index for choice in ids.choices] == [0, 1]

    def test_logprobs(self, sync: openai.OpenAI) -> None:
        completion = sync.completions.create(
            model="demo", prompt="12+7=", max_tokens=0, echo=True, logprobs=2, temperature=0
        )
        logprobs = completion.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.tokens == ["<s>", "1", "2", "+", "7", "="]
        assert logprobs.text_offset == [0, 0, 1, 2, 3, 4]
        assert logprobs.token_logprobs is not None
        first, *others = logprobs.token_logprobs
        assert first is None
        assert all(each < 0 for each in others)
        chat = sync.chat.completions.create(
            model="demo", messages=QUESTION, max_tokens=2, temperature=0, logprobs=True, top_logprobs=3
        )
        chat_logprobs = chat.choices[0].logprobs
        assert chat_logprobs is not None
        assert chat_logprobs.content is not None
        assert [len(token.top_logprobs) for token in chat_logprobs.content] == [3, 3]
        assert chat_logprobs.content[0].bytes == list(chat_logprobs.content[0].token.encode())

    def test_a_schema_is_followed(self, sync: openai.OpenAI) -> None:
        response_format: Any = {"type": "json_schema", "json_schema": {"name": "sum", "schema": SCHEMA}}
        chat = sync.chat.completions.create(model="demo", messages=QUESTION, response_format=response_format)
        assert json.loads(chat.choices[0].message.content or "")["total"] in (19, 20)
        choice = sync.completions.create(model="demo", prompt="x", extra_body={"guided_choice": ["north", "south"]})
        assert choice.choices[0].text in ("north", "south")

    def test_tools(self, sync: openai.OpenAI) -> None:
        asked: Any = {
            "model": "demo",
            "messages": QUESTION,
            "tools": [TOOL],
            "tool_choice": "required",
            "parallel_tool_calls": False,
        }
        whole = sync.chat.completions.create(**asked)
        assert whole.choices[0].finish_reason == "tool_calls"
        (call,) = whole.choices[0].message.tool_calls or []
        assert call.type == "function"
        assert call.function.name == "add"
        assert json.loads(call.function.arguments)["total"] in (19, 20)
        with sync.chat.completions.stream(**asked) as stream:
            (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or []
        assert json.loads(streamed.function.arguments or "")["total"] in (19, 20)
        answered: list[Any] = [
            *QUESTION,
            whole.choices[0].message,
            {"role": "tool", "tool_call_id": call.id, "content": "19"},
        ]
        again = sync.chat.completions.create(model="demo", messages=answered, tools=[TOOL], max_tokens=5)
        assert again.choices[0].message.role == "assistant"

    def test_errors_are_openais(self, sync: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError, match="temperature: must be finite") as bad:
            sync.completions.create(model="demo", prompt="x", temperature=-1)
        assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
        assert bad.value.request_id
        with pytest.raises(openai.BadRequestError) as long:
            sync.completions.create(model="demo", prompt="x", max_tokens=100_000, stream=True)
        assert long.value.code == "context_length_exceeded"
        with pytest.raises(openai.NotFoundError):
            sync.chat.completions.create(model="other", messages=QUESTION)
        with pytest.raises(openai.InternalServerError, match="embeddings are not served"):
            sync.embeddings.create(model="demo", input="x")
        with pytest.raises(openai.InternalServerError, match="deadline") as late:
            sync.completions.create(
                model="demo",
                prompt=STORY,
                max_tokens=3000,
                extra_body={"ignore_eos": True},
                extra_headers={"X-Request-Timeout-S": "0.05"},
            )
        assert late.value.status_code == 504

    async def test_async_streams_at_the_same_time(self, aio: openai.AsyncOpenAI) -> None:
        async def story(seed: int) -> str:
            stream = await aio.completions.create(
                model="demo", prompt=STORY, max_tokens=10, temperature=1, seed=seed % 4, stream=True
            )
            return "".join([event.choices[0].text async for event in stream])

        stories = await asyncio.gather(*(story(seed) for seed in range(64)))
        assert len(stories) == 64
        assert all(stories[seed] == stories[seed % 4] for seed in range(64))


class TestHangingUp:
    async def test_on_a_stream(self, aio: openai.AsyncOpenAI) -> None:
        stream = await aio.completions.create(
            model="demo", prompt=STORY, max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
        )
        async for _ in stream:
            break
        await stream.close()

    def test_on_a_whole_answer(self, demo_cluster: ClusterUnderTest, idle: Client) -> None:
        where = urlsplit(demo_cluster.url)
        body = json.dumps({"prompt": [STORY] * 2, "max_tokens": 1500, "ignore_eos": True}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        with socket.create_connection((where.hostname, where.port)) as connection:
            connection.sendall(head.encode() + b"\r\n\r\n" + body)
            while not any(worker.running for worker in idle.status().workers):
                pass

    async def test_on_what_nobody_reads(self, http: httpx.AsyncClient) -> None:
        """The slow reader's own request pauses; everybody else's go on."""
        payload = {"prompt": STORY, "max_tokens": 3000, "ignore_eos": True, "stream": True}
        async with http.stream("POST", "/v1/completions", json=payload):
            measured = await load_client.complete(http, "demo", STORY, 20)
            assert measured.output_tokens == 20


class TestNode:
    def test_openais_package(self, demo_cluster: ClusterUnderTest, idle: Client) -> None:
        program = [node(), str(NODE_FOLDER / "openai_client.mjs"), demo_cluster.url, "demo"]
        done = subprocess.run(program, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        seen = json.loads(done.stdout)
        assert (seen["said"], seen["seen"]) == ("19", 3)
        assert seen["total"] in (19, 20)


class TestLoadGenerators:
    async def test_events_are_tokens(self, http: httpx.AsyncClient, idle: Client) -> None:
        prompt = list(idle.tokenize(STORY))
        measured = await asyncio.gather(
            *(load_client.complete(http, "demo", prompt, 30) for _ in range(8)),
            *(load_client.chat(http, "demo", STORY, 30) for _ in range(8)),
        )
        for each in measured:
            assert each.num_events == each.output_tokens == 30
            assert len(each.gaps_s) == 29
            assert each.text
        assert {each.prompt_tokens for each in measured[:8]} == {len(prompt)}
        expected = idle.generate(prompt, max_tokens=30, temperature=0.0, ignore_eos=True)
        assert {each.text for each in measured[:8]} == {expected.text}
