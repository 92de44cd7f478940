"""The asyncio client: `Client` with awaits. Made and used on one event loop."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import Self, Unpack

import grpc.aio

from baton.client.channel import MAX_MESSAGE_BYTES, Tls, baton_errors, call_metadata, channel_options
from baton.client.completion import CompletionBuilder
from baton.client.request import GenerateOptions, Prompt, build_request
from baton.client.results import ClusterStatus, Completion, Delta, ModelInfo
from baton.v1 import inference_pb2, inference_pb2_grpc


class AsyncClient:
    """A connection to a router, at `target` = "host:port"; close it, or use it as an async context manager.

    `api_key` is sent with every call, and `tls` encrypts the connection; both where the router asks for them.
    `timeout_s` of the smaller calls bounds each of them; `generate` and `stream` take theirs as an option.
    Every method raises `baton.errors.BatonError`.
    """

    def __init__(
        self,
        target: str,
        *,
        api_key: str | None = None,
        tls: Tls | None = None,
        timeout_s: float | None = 30.0,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self.target = target
        self._timeout_s = timeout_s
        self._metadata = call_metadata(api_key)
        options = channel_options(max_message_bytes, tls)
        if tls is None:
            self._channel = grpc.aio.insecure_channel(target, options=options)
        else:
            self._channel = grpc.aio.secure_channel(target, tls.credentials(), options=options)
        self._stub: inference_pb2_grpc.InferenceAsyncStub = inference_pb2_grpc.InferenceStub(self._channel)

    async def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
        """Generates the whole answer to a text or to token ids."""
        builder = CompletionBuilder()
        async for delta in self.stream(prompt, **options):
            builder.add(delta)
        return builder.build()

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> AsyncGenerator[Delta, None]:
        """Generates, giving every piece as it comes.

        The call starts with the first step; `aclose()`, or cancelling the task that iterates, cancels the call.
        """
        return self._deltas(build_request(prompt, **options), options.get("timeout_s"))

    async def _deltas(
        self, request: inference_pb2.GenerateRequest, timeout_s: float | None
    ) -> AsyncGenerator[Delta, None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(baton_errors())
            call = self._stub.Generate(request, timeout=timeout_s, metadata=self._metadata)
            stack.callback(call.cancel)
            async for response in call:
                yield Delta.from_wire(response)

    async def model_info(self) -> ModelInfo:
        """What is served, and its limits."""
        with baton_errors():
            request = inference_pb2.GetModelInfoRequest()
            return ModelInfo.from_wire(
                await self._stub.GetModelInfo(request, timeout=self._timeout_s, metadata=self._metadata)
            )

    async def status(self) -> ClusterStatus:
        """The router's load and its workers."""
        with baton_errors():
            request = inference_pb2.GetClusterStatusRequest()
            return ClusterStatus.from_wire(
                await self._stub.GetClusterStatus(request, timeout=self._timeout_s, metadata=self._metadata)
            )

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a text, as `generate` would read it."""
        with baton_errors():
            request = inference_pb2.TokenizeRequest(text=text, add_special_tokens=add_special_tokens)
            return tuple(
                (await self._stub.Tokenize(request, timeout=self._timeout_s, metadata=self._metadata)).token_ids
            )

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        with baton_errors():
            request = inference_pb2.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)
            return (await self._stub.Detokenize(request, timeout=self._timeout_s, metadata=self._metadata)).text

    async def close(self) -> None:
        """Cancels what is running and closes the connection."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
