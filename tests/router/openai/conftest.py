"""The API over a real tokenizer and a fake pipeline."""

from __future__ import annotations

import json
import pathlib
import types
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp

from baton.config import RouterConfig
from baton.internal.v1 import worker_pb2
from router.api_keys import ApiKeys
from router.http import create_app
from router.model_card import read_model_card
from router.openai.api import OpenAIApi
from router.openai.chat_format import ChatFormat
from router.openai.served_model import ServedModel
from router.tokenization import Tokenizer
from tests.router.openai.fake_pipeline import FakePipeline, answer, words

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% for tool in tools or [] %}<tool_call>{{ tool.function.name }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% if think %}<think>{% endif %}{% endif %}"
)


class Http:
    """Calls the API and reads what it answers."""

    def __init__(self, app: ASGIApp, pipeline: FakePipeline) -> None:
        self.app = app
        self.pipeline = pipeline
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://router")

    async def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        return await self.client.post(path, json=body, headers={k.replace("_", "-"): v for k, v in headers.items()})

    async def ok(self, path: str, **body: Any) -> Any:
        """The answer to a request that succeeds."""
        response = await self.post(path, body)
        assert response.status_code == 200, response.text
        return response.json()

    async def error(self, path: str, body: Any, status: int = 400) -> Any:
        """The error of a request that does not."""
        response = await self.post(path, body)
        assert response.status_code == status, response.text
        return response.json()["error"]

    async def events(self, path: str, **body: Any) -> list[Any]:
        """The events of a stream that ends as it should."""
        response = await self.post(path, {"stream": True, **body})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        *events, done = read_events(response.content)
        assert done == "[DONE]"
        return events

    async def complete(self, **body: Any) -> Any:
        return await self.ok("/v1/completions", **{"prompt": "hello", **body})

    async def chat(self, **body: Any) -> Any:
        return await self.ok("/v1/chat/completions", **{"messages": [{"role": "user", "content": "hello"}], **body})


def read_events(stream: bytes) -> list[Any]:
    """Every event of a stream, `[DONE]` as it is."""
    *events, rest = stream.decode("ascii").split("\n\n")
    assert rest == ""
    data = [event.removeprefix("data: ") for event in events]
    return [each if each == "[DONE]" else json.loads(each) for each in data]


@pytest.fixture(scope="session")
def chat_checkpoint(checkpoint: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The mock checkpoint, with a chat template that knows tools and reasoning."""
    folder = tmp_path_factory.mktemp("chat-model")
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def pipeline() -> FakePipeline:
    return FakePipeline(lambda request: answer(*words("hi there")))


@pytest.fixture
def router_config() -> RouterConfig:
    return RouterConfig(max_prompts=4, max_message_bytes=20_000)


@pytest.fixture
def tokenizer_of_api(chat_checkpoint: pathlib.Path) -> Iterator[Tokenizer]:
    tokenizer = Tokenizer(str(chat_checkpoint), read_model_card(str(chat_checkpoint), "mock"))
    yield tokenizer
    tokenizer.close()


@pytest.fixture
def http(
    chat_checkpoint: pathlib.Path, tokenizer_of_api: Tokenizer, pipeline: FakePipeline, router_config: RouterConfig
) -> Http:
    card = read_model_card(str(chat_checkpoint), "mock")
    membership: Any = types.SimpleNamespace(decode_infos=[worker_pb2.WorkerInfo(max_model_len=512)])
    api = OpenAIApi(
        pipeline=pipeline,
        tokenizer=tokenizer_of_api,
        model=ServedModel(card, membership),
        chat_format=ChatFormat.load(str(chat_checkpoint), card, router_config),
        keys=ApiKeys(router_config.api_keys),
        config=router_config,
    )
    app = create_app(is_ready=lambda: True, registry=CollectorRegistry(), api_routes=api.routes)
    return Http(app, pipeline)
