"""A scripted Inference service on a real port, for tests of the clients and of the command line."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc

from baton.v1 import inference_pb2, inference_pb2_grpc


class FakeInference(inference_pb2_grpc.InferenceServicer):
    """Answers `Generate` with `responses`, then with `failure` or, where `stall` is set, with silence.

    Attributes:
        requests: every GenerateRequest that arrived.
        cancelled: set when a stalled call was cancelled or its deadline passed.
    """

    def __init__(self) -> None:
        self.responses: Sequence[inference_pb2.GenerateResponse] = ()
        self.failure: tuple[grpc.StatusCode, str] | None = None
        self.stall = False
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.cancelled = threading.Event()
        self.status = inference_pb2.GetClusterStatusResponse()
        self.target = ""

    def Generate(  # noqa: N802
        self, request: inference_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[inference_pb2.GenerateResponse]:
        self.requests.append(request)
        if self.stall and not context.add_callback(self.cancelled.set):
            # The call was over before it got here.
            self.cancelled.set()
        yield from self.responses
        if self.stall:
            self.cancelled.wait()
        if self.failure is not None:
            context.abort(*self.failure)

    def GetModelInfo(  # noqa: N802
        self, request: inference_pb2.GetModelInfoRequest, context: grpc.ServicerContext
    ) -> inference_pb2.GetModelInfoResponse:
        return inference_pb2.GetModelInfoResponse(
            name="demo",
            architecture="llama",
            vocab_size=1000,
            max_model_len=2048,
            dtype="float32",
            block_size=16,
            eos_token_ids=[2],
            max_n=16,
            max_logprobs=20,
        )

    def GetClusterStatus(  # noqa: N802
        self, request: inference_pb2.GetClusterStatusRequest, context: grpc.ServicerContext
    ) -> inference_pb2.GetClusterStatusResponse:
        return self.status

    def Tokenize(  # noqa: N802
        self, request: inference_pb2.TokenizeRequest, context: grpc.ServicerContext
    ) -> inference_pb2.TokenizeResponse:
        bos = [1] if request.add_special_tokens else []
        return inference_pb2.TokenizeResponse(token_ids=[*bos, *request.text.encode()])

    def Detokenize(  # noqa: N802
        self, request: inference_pb2.DetokenizeRequest, context: grpc.ServicerContext
    ) -> inference_pb2.DetokenizeResponse:
        kept = [token for token in request.token_ids if token > 2 or not request.skip_special_tokens]
        return inference_pb2.DetokenizeResponse(text=bytes(kept).decode())


@contextlib.contextmanager
def serving() -> Iterator[FakeInference]:
    """Serves a `FakeInference` at its `target` while the context lasts."""
    with ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool)
        fake = FakeInference()
        inference_pb2_grpc.add_InferenceServicer_to_server(fake, server)
        fake.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        try:
            yield fake
        finally:
            fake.cancelled.set()
            server.stop(None).wait()


def piece(text: str, *token_ids: int, index: int = 0, finish: int = 0) -> inference_pb2.GenerateResponse:
    """One message with one choice's delta."""
    choice = inference_pb2.ChoiceDelta(
        index=index, text=text, token_ids=token_ids, finish_reason=inference_pb2.FinishReason.ValueType(finish)
    )
    return inference_pb2.GenerateResponse(request_id="r-1", choices=[choice])


def ending(prompt: int, cached: int, completion: int) -> inference_pb2.GenerateResponse:
    """The last message."""
    return inference_pb2.GenerateResponse(
        request_id="r-1",
        usage=inference_pb2.Usage(prompt_tokens=prompt, cached_tokens=cached, completion_tokens=completion),
        timings=inference_pb2.StageTimings(
            queue_s=0.001,
            prefill_s=0.25,
            decode_s=0.5,
            attempts=1,
            prefill_worker="prefill-0",
            decode_worker="decode-0",
        ),
    )
