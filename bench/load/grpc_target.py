"""Baton's own gRPC API, through its Python client."""

from __future__ import annotations

import time

from baton.client import AsyncClient, Tls
from baton.errors import UnavailableError
from bench.load.outcome import Outcome
from bench.load.requests import is_chat
from bench.load.targets import ServedModel


class GrpcTarget:
    """A router at `target` = "host:port"."""

    def __init__(
        self, target: str, *, model: str | None = None, api_key: str | None = None, tls_ca: str | None = None
    ) -> None:
        tls = None if tls_ca is None else Tls(ca_file=tls_ca)
        self._client = AsyncClient(target, api_key=api_key, tls=tls)
        self._model = model

    async def served_model(self) -> ServedModel:
        try:
            info = await self._client.model_info()
        except UnavailableError as error:
            raise UnavailableError(f"{self._client.target} cannot be reached: {error}") from error
        return ServedModel(info.name, info.vocab_size, info.max_model_len)

    async def send(self, outcome: Outcome) -> None:
        request = outcome.request
        assert not is_chat(request.prompt)
        async for delta in self._client.stream(
            request.prompt, max_tokens=request.max_tokens, temperature=0.0, ignore_eos=True, model=self._model
        ):
            for choice in delta.choices:
                if choice.token_ids:
                    outcome.add_tokens(time.perf_counter(), len(choice.token_ids))
                if request.follow_ups:
                    outcome.text += choice.text
                    outcome.token_ids += choice.token_ids
            if delta.usage is not None:
                outcome.prompt_tokens = delta.usage.prompt_tokens
                outcome.cached_tokens = delta.usage.cached_tokens
                outcome.completion_tokens = delta.usage.completion_tokens

    async def close(self) -> None:
        await self._client.close()
