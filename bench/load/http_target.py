"""Any server with OpenAI's API, over HTTP with server-sent events.

aiohttp, whose HTTP parser is C: an event costs a fraction of what it does with a client in pure Python.
"""

from __future__ import annotations

import ssl
import time
from typing import Any

import aiohttp

from baton.errors import InternalError, InvalidRequestError, UnavailableError
from bench.load.outcome import Outcome
from bench.load.requests import LoadRequest, is_chat
from bench.load.sse import EventReader
from bench.load.targets import Api, ServedModel, http_error

_CONNECT_TIMEOUT_S = 10.0


class HttpTarget:
    """A server at `url` = "http://host:port"; a path such as /v1 at its end may be left out."""

    def __init__(
        self,
        url: str,
        *,
        api: Api = "completions",
        model: str | None = None,
        api_key: str | None = None,
        tls_ca: str | None = None,
        continuous_usage: bool = False,
    ) -> None:
        self._base = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._api: Api = api
        self._model = model
        self._stream_options = {"include_usage": True} | ({"continuous_usage_stats": True} if continuous_usage else {})
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S),
            connector=aiohttp.TCPConnector(
                limit=0, ssl=ssl.create_default_context(cafile=tls_ca) if tls_ca is not None else True
            ),
        )

    async def served_model(self) -> ServedModel:
        try:
            async with self._session.get(f"{self._base}/models") as response:
                if response.status != 200:
                    raise http_error(response.status, f"{self._base}/models: {await _message_of(response)}")
                models: list[dict[str, Any]] = (await response.json(content_type=None))["data"]
        except (aiohttp.ClientError, TimeoutError) as error:
            raise UnavailableError(f"{self._base} cannot be reached: {error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InternalError(f"{self._base}/models is no list of models") from error
        names = [model["id"] for model in models]
        if self._model is None and len(names) != 1:
            raise InvalidRequestError("--model", f"must name one of those served: {', '.join(names)}")
        self._model = self._model or names[0]
        served = next((model for model in models if model["id"] == self._model), {})
        return ServedModel(self._model, max_model_len=served.get("max_model_len"))

    async def send(self, outcome: Outcome) -> None:
        request = outcome.request
        reader = EventReader(outcome, keeps_answer=bool(request.follow_ups))
        route = "completions" if self._api == "completions" else "chat/completions"
        try:
            async with self._session.post(f"{self._base}/{route}", json=self._payload(request)) as response:
                if response.status != 200:
                    raise http_error(response.status, await _message_of(response))
                async for chunk in response.content.iter_any():
                    reader.feed(chunk, time.perf_counter())
        except (aiohttp.ClientError, TimeoutError) as error:
            raise UnavailableError(f"{self._base}: {error or type(error).__name__}") from error
        reader.finish()
        if request.follow_ups and self._api == "completions" and not isinstance(request.prompt, str):
            _check_token_ids(outcome)

    async def close(self) -> None:
        await self._session.close()

    def _payload(self, request: LoadRequest) -> dict[str, Any]:
        payload: dict[str, Any] = {
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": self._stream_options,
        }
        if self._model is not None:
            payload["model"] = self._model
        if self._api == "chat":
            assert is_chat(request.prompt)
            payload["messages"] = request.prompt
        else:
            payload["prompt"] = request.prompt
            if request.follow_ups and not isinstance(request.prompt, str):
                payload["return_token_ids"] = True
        return payload


def _check_token_ids(outcome: Outcome) -> None:
    if len(outcome.token_ids) != outcome.output_tokens:
        problem = f"the server told {len(outcome.token_ids)} ids of {outcome.output_tokens} tokens; use --api chat"
        raise InvalidRequestError("return_token_ids", problem)


async def _message_of(response: aiohttp.ClientResponse) -> str:
    """The message of an error's body, in OpenAI's form or as it stands, with the status."""
    text = await response.text(errors="replace")
    try:
        text = (await response.json(content_type=None))["error"]["message"]
    except (ValueError, KeyError, TypeError):
        text = text.strip()[:200]
    return f"HTTP {response.status}: {text}"
