"""Many prompts as one stream, which ends whatever becomes of one of them."""

from __future__ import annotations

import asyncio

import pytest

from baton.errors import InternalError
from baton.v1 import inference_pb2
from router.openai.generation import KeepingSink, generate_all
from router.sink import Sink
from tests.router.openai.fake_pipeline import FakePipeline, answer, words


class Panic(BaseException):
    """As pyo3's, which is no Exception."""


class FailingPipeline(FakePipeline):
    """Raises what stands for a request that says "bad"."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(lambda request: answer(*words("hi there")))
        self._error = error

    async def generate(
        self, request: inference_pb2.GenerateRequest, sink: Sink, timeout_s: float | None = None
    ) -> None:
        if request.text == "bad":
            raise self._error
        await super().generate(request, sink, timeout_s)


@pytest.mark.parametrize("error", [asyncio.CancelledError(), Panic("unwrap")])
async def test_what_ends_a_request_ends_the_stream(error: BaseException) -> None:
    requests = [inference_pb2.GenerateRequest(text=text) for text in ("good", "bad")]
    with pytest.raises(InternalError):
        await generate_all(
            FailingPipeline(error), requests, lambda index: KeepingSink(index, lambda index, response: None), None
        )
