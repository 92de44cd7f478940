"""`/v1/completions` and `/v1/chat/completions`: from a request's body to its answer."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Awaitable, Callable, Iterator, Sequence

from starlette.requests import Request
from starlette.responses import Response

from baton.config import RouterConfig
from baton.errors import BatonError
from baton.v1 import inference_pb2
from router.openai.body import read_model
from router.openai.call import Call
from router.openai.chat_answer import ChatAnswer
from router.openai.chat_request import ChatRequest
from router.openai.completion_answer import CompletionAnswer
from router.openai.completion_request import CompletionRequest
from router.openai.envelope import Envelope
from router.openai.errors import as_api_error
from router.openai.event_stream import EventStream, unless_hung_up
from router.openai.generation import EventSink, Generates, KeepingSink, generate_all
from router.openai.logprobs import TokenNames
from router.openai.prompting import Prompting
from router.openai.served_model import ServedModel
from router.openai.token_bytes import TokenBytes
from router.sink import Sink, Writer

SinkOf = Callable[[int], Sink]


class Serving:
    """Answers the two routes that generate."""

    def __init__(
        self,
        *,
        pipeline: Generates,
        prompting: Prompting,
        model: ServedModel,
        token_bytes: TokenBytes,
        config: RouterConfig,
    ) -> None:
        self._pipeline = pipeline
        self._prompting = prompting
        self._model = model
        self._token_bytes = token_bytes
        self._config = config

    async def completions(self, request: Request, call: Call) -> Response:
        """`POST /v1/completions`."""
        asked = await read_model(request, CompletionRequest, self._config.max_message_bytes)
        self._model.check(asked.model)
        prompts = asked.prompts(self._config.max_prompts, self._model.max_model_len)
        sampling = asked.sampling()

        async def generate(sink_of: SinkOf) -> None:
            generate_requests = [await self._prompting.completion(asked, prompt) for prompt in prompts]
            await self._generate(generate_requests, sampling, call, "cmpl", sink_of)

        envelope = self._envelope(asked, call.answer_id("cmpl"), "text_completion", "text_completion")
        answer = CompletionAnswer(asked, len(prompts), envelope=envelope, names=self._names(asked))
        return await self._answer(request, asked, answer, generate)

    async def chat_completions(self, request: Request, call: Call) -> Response:
        """`POST /v1/chat/completions`."""
        asked = await read_model(request, ChatRequest, self._config.max_message_bytes)
        self._model.check(asked.model)
        sampling = asked.sampling()
        with _in_terms_of(asked):
            generate_request, turn = await self._prompting.chat(asked)
            turn.shape(sampling)

        async def generate(sink_of: SinkOf) -> None:
            await self._generate([generate_request], sampling, call, "chatcmpl", sink_of)

        envelope = self._envelope(asked, call.answer_id("chatcmpl"), "chat.completion", "chat.completion.chunk")
        answer = ChatAnswer(asked, turn, envelope=envelope, names=self._names(asked))
        return await self._answer(request, asked, answer, generate)

    async def _generate(
        self,
        generate_requests: Sequence[inference_pb2.GenerateRequest],
        sampling: inference_pb2.SamplingParams,
        call: Call,
        kind: str,
        sink_of: SinkOf,
    ) -> None:
        for request_id, each in zip(call.pipeline_ids(kind, len(generate_requests)), generate_requests, strict=True):
            each.request_id = request_id
            each.sampling.CopyFrom(sampling)
        await generate_all(self._pipeline, generate_requests, sink_of, call.timeout_s)

    async def _answer(
        self,
        request: Request,
        asked: CompletionRequest | ChatRequest,
        answer: CompletionAnswer | ChatAnswer,
        generate: Callable[[SinkOf], Awaitable[None]],
    ) -> Response:
        async def events(writer: Writer[bytes]) -> None:
            await generate(lambda index: EventSink(index, answer, writer))
            if event := answer.last_event():
                writer.send(event)

        async def whole() -> bytes:
            await generate(lambda index: KeepingSink(index, answer.keep))
            return await answer.whole()

        if asked.stream:
            return EventStream(events, on_error=functools.partial(as_api_error, names=asked.field_names()))
        with _in_terms_of(asked):
            body = await unless_hung_up(request.receive, whole())
        return Response(body, media_type="application/json")

    def _envelope(
        self, asked: CompletionRequest | ChatRequest, answer_id: str, object_name: str, event_name: str
    ) -> Envelope:
        return Envelope(
            answer_id,
            object_name=object_name,
            event_name=event_name,
            model=self._model.name,
            fingerprint=self._model.fingerprint,
            include_usage=asked.include_usage,
        )

    def _names(self, asked: CompletionRequest | ChatRequest) -> TokenNames:
        return TokenNames(self._token_bytes, as_ids=asked.return_tokens_as_token_ids)


@contextlib.contextmanager
def _in_terms_of(asked: CompletionRequest | ChatRequest) -> Iterator[None]:
    """Names the fields that errors are about as the client knows them."""
    try:
        yield
    except BatonError as error:
        raise as_api_error(error, asked.field_names()) from error
