"""The public gRPC service. The only place where Baton's errors become gRPC statuses."""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NoReturn, TypeVar

import grpc
import grpc.aio

import baton
from baton.config import RouterConfig
from baton.errors import BatonError, InternalError, InvalidRequestError, UnavailableError
from baton.v1 import inference_pb2, inference_pb2_grpc
from router.batch import WriteBatch
from router.intake import Intake
from router.membership import Membership
from router.model_card import ModelCard
from router.pipeline import Pipeline
from router.sink import ResponseSink, Writer
from router.snapshot import WorkerView
from router.tokenization import Tokenizer

_log = logging.getLogger(__name__)

SERVICE: str = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name

# Details travel in trailers, which HTTP/2 peers limit to 8 KiB.
_MAX_DETAIL_CHARS = 1024

_Context = grpc.aio.ServicerContext[Any, Any]
_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


async def _abort(context: _Context, error: BatonError) -> NoReturn:
    await context.abort(grpc.StatusCode[error.status], error.message[:_MAX_DETAIL_CHARS])


def _with_statuses(
    method: Callable[[Any, _Request, _Context], Awaitable[_Response]],
) -> Callable[[Any, _Request, _Context], Coroutine[Any, Any, _Response]]:
    """Ends a call with the status of whatever error comes out of its method."""

    @functools.wraps(method)
    async def answer(self: Any, request: _Request, context: _Context) -> _Response:
        try:
            return await method(self, request, context)
        except BatonError as error:
            await _abort(context, error)
        except Exception:
            _log.exception("unexpected error")
            await _abort(context, InternalError("internal error; see the router's log"))

    return answer


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """baton.v1.Inference over the pipeline and what the router knows of model and cluster."""

    def __init__(
        self,
        *,
        pipeline: Pipeline,
        intake: Intake,
        tokenizer: Tokenizer,
        membership: Membership,
        card: ModelCard,
        config: RouterConfig,
    ) -> None:
        self._pipeline = pipeline
        self._intake = intake
        self._tokenizer = tokenizer
        self._membership = membership
        self._card = card
        self._config = config
        self._batch = WriteBatch()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Answers the service's methods."""
        inference_pb2_grpc.add_InferenceServicer_to_server(self, server)
        # What `Generate` writes is serialised already.
        generate: grpc.RpcMethodHandler[inference_pb2.GenerateRequest, bytes] = grpc.unary_stream_rpc_method_handler(
            self.Generate,
            request_deserializer=inference_pb2.GenerateRequest.FromString,
        )
        server.add_registered_method_handlers(SERVICE, {"Generate": generate})

    @_with_statuses
    async def Generate(  # type: ignore[override]  # noqa: N802
        self, request: inference_pb2.GenerateRequest, context: _Context
    ) -> None:
        # A coroutine that writes, since grpc leaves a cancelled async generator to the garbage collector.
        sink = ResponseSink(Writer(context.write, batch=self._batch))
        await self._pipeline.generate(request, sink, context.time_remaining())

    @_with_statuses
    async def GetModelInfo(  # noqa: N802
        self, request: inference_pb2.GetModelInfoRequest, context: _Context
    ) -> inference_pb2.GetModelInfoResponse:
        infos = self._membership.decode_infos
        if not infos:
            raise UnavailableError("no decode worker has joined yet")
        return inference_pb2.GetModelInfoResponse(
            name=self._card.name,
            architecture=self._card.architecture,
            vocab_size=self._card.vocab_size,
            max_model_len=self._intake.limits().max_model_len,
            dtype=infos[0].dtype,
            block_size=infos[0].block_size,
            eos_token_ids=self._card.eos_token_ids,
            bos_token_id=self._card.bos_token_id,
            max_n=self._config.max_n,
            max_logprobs=self._config.max_logprobs,
        )

    @_with_statuses
    async def GetClusterStatus(  # noqa: N802
        self, request: inference_pb2.GetClusterStatusRequest, context: _Context
    ) -> inference_pb2.GetClusterStatusResponse:
        snapshot = self._membership.snapshot
        return inference_pb2.GetClusterStatusResponse(
            version=baton.__version__,
            model=self._card.name,
            ready=snapshot.ready,
            queued=self._pipeline.num_queued,
            running=self._pipeline.num_running - self._pipeline.num_queued,
            workers=[_worker_status(view) for view in (*snapshot.prefill, *snapshot.decode)],
        )

    @_with_statuses
    async def Tokenize(  # noqa: N802
        self, request: inference_pb2.TokenizeRequest, context: _Context
    ) -> inference_pb2.TokenizeResponse:
        add_special = request.add_special_tokens if request.HasField("add_special_tokens") else True
        token_ids = await self._tokenizer.encode(request.text, add_special_tokens=add_special)
        return inference_pb2.TokenizeResponse(token_ids=token_ids)

    @_with_statuses
    async def Detokenize(  # noqa: N802
        self, request: inference_pb2.DetokenizeRequest, context: _Context
    ) -> inference_pb2.DetokenizeResponse:
        token_ids = list(request.token_ids)
        if token_ids and max(token_ids) >= self._card.vocab_size:
            problem = f"{max(token_ids)} is not below the vocabulary's {self._card.vocab_size}"
            raise InvalidRequestError("token_ids", problem)
        text = await self._tokenizer.run(
            self._tokenizer.decode, token_ids, skip_special_tokens=request.skip_special_tokens
        )
        return inference_pb2.DetokenizeResponse(text=text)


def _worker_status(view: WorkerView) -> inference_pb2.WorkerStatus:
    return inference_pb2.WorkerStatus(
        role=view.role,
        name=view.key.name,
        epoch=view.key.epoch,
        address=view.address,
        metrics_address=view.metrics_address,
        pid=view.pid,
        healthy=view.connected,
        running=view.running,
        waiting=view.waiting,
        free_blocks=view.free_blocks,
        total_blocks=view.total_blocks,
    )
