"""The blocking client against a scripted server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import grpc
import pytest

from baton import errors
from baton.client import Client, FinishReason, Usage
from baton.v1 import inference_pb2
from tests.baton.fake_inference import FakeInference, ending, piece, serving


@pytest.fixture
def server() -> Iterator[FakeInference]:
    with serving() as fake:
        yield fake


@pytest.fixture
def client(server: FakeInference) -> Iterator[Client]:
    with Client(server.target) as connected:
        yield connected


def test_a_completion_joins_the_pieces(server: FakeInference, client: Client) -> None:
    server.responses = [piece("Once", 5), piece(" upon", 6, 7, finish=2), ending(4, 0, 3)]
    completion = client.generate("tell", max_tokens=3)
    assert completion.text == "Once upon"
    assert completion.request_id == "r-1"
    assert completion.choices[0].token_ids == (5, 6, 7)
    assert completion.choices[0].finish_reason is FinishReason.LENGTH
    assert completion.usage == Usage(prompt_tokens=4, cached_tokens=0, completion_tokens=3)
    assert (completion.timings.prefill_s, completion.timings.decode_worker) == (0.25, "decode-0")
    assert server.requests[0].sampling.max_tokens == 3


def test_choices_are_told_apart_whatever_order_they_come_in(server: FakeInference, client: Client) -> None:
    server.responses = [piece("b", 2, index=1), piece("a", 1), piece("B", 3, index=1, finish=1), ending(1, 0, 3)]
    completion = client.generate([1], n=2)
    assert [(choice.index, choice.text) for choice in completion.choices] == [(0, "a"), (1, "bB")]
    assert completion.choices[1].finish_reason is FinishReason.STOP


def test_logprobs_stop_and_echo_are_kept(server: FakeInference, client: Client) -> None:
    first = piece("x", 5)
    first.prompt.text = "tell"
    first.prompt.token_ids.extend([1, 9])
    entry = first.choices[0].logprobs.add()
    entry.sampled.token_id, entry.sampled.logprob = 5, -0.5
    entry.top.add(token_id=6, logprob=-0.25)
    last = piece("", finish=1)
    last.choices[0].stop_text = "User:"
    server.responses = [first, last, ending(2, 0, 1)]
    completion = client.generate("tell")
    assert completion.prompt is not None
    assert (completion.prompt.text, completion.prompt.token_ids) == ("tell", (1, 9))
    assert completion.choices[0].logprobs[0].sampled == -0.5
    assert completion.choices[0].logprobs[0].top == ((6, -0.25),)
    assert completion.choices[0].matched_stop == "User:"


def test_a_stream_gives_each_message_as_it_comes_and_usage_with_the_last(server: FakeInference, client: Client) -> None:
    server.responses = [piece("a", 1), piece("b", 2)]
    server.stall = True
    stream = client.stream("tell")
    assert next(stream).text == "a"
    second = next(stream)
    assert (second.text, second.usage) == ("b", None)
    assert not server.cancelled.is_set()
    stream.close()


def test_closing_a_stream_cancels_the_call(server: FakeInference, client: Client) -> None:
    server.responses, server.stall = [piece("a", 1)], True
    stream = client.stream("tell")
    next(stream)
    stream.close()
    assert server.cancelled.wait(10)


def test_an_error_of_the_consumer_cancels_the_call(server: FakeInference, client: Client) -> None:
    server.responses, server.stall = [piece("a", 1)], True

    def consume() -> None:
        for _ in client.stream("tell"):
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        consume()
    assert server.cancelled.wait(10)


def test_a_stream_that_is_never_read_calls_nothing(server: FakeInference, client: Client) -> None:
    client.stream("tell").close()
    assert client.tokenize("x") == (1, 120)
    assert server.requests == []


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidRequestError),
        (grpc.StatusCode.NOT_FOUND, errors.ModelNotFoundError),
        (grpc.StatusCode.ALREADY_EXISTS, errors.DuplicateRequestError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.OverloadedError),
        (grpc.StatusCode.UNAVAILABLE, errors.UnavailableError),
        (grpc.StatusCode.UNKNOWN, errors.InternalError),
    ],
)
def test_a_failed_call_raises_batons_error(
    server: FakeInference, client: Client, code: grpc.StatusCode, expected: type[errors.BatonError]
) -> None:
    server.responses, server.failure = [piece("a", 1)], (code, "top_p: must be in (0, 1]")
    with pytest.raises(expected, match="top_p: must be in") as caught:
        client.generate("tell")
    assert type(caught.value) is expected


def test_the_deadline_ends_the_call_on_both_sides(server: FakeInference, client: Client) -> None:
    server.stall = True
    with pytest.raises(errors.DeadlineError):
        client.generate("tell", timeout_s=0.2)
    assert server.cancelled.wait(10)


def test_nobody_listening_is_unavailable() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(errors.UnavailableError):
        client.generate("tell")


def test_a_stream_without_its_last_message_is_an_error(server: FakeInference, client: Client) -> None:
    server.responses = [piece("a", 1)]
    with pytest.raises(errors.InternalError, match="without usage"):
        client.generate("tell")


def test_model_info(client: Client) -> None:
    info = client.model_info()
    assert (info.name, info.max_model_len, info.eos_token_ids, info.bos_token_id) == ("demo", 2048, (2,), None)


def test_status(server: FakeInference, client: Client) -> None:
    worker = inference_pb2.WorkerStatus(role="decode", name="decode-0", epoch=2, free_blocks=7, total_blocks=9)
    server.status = inference_pb2.GetClusterStatusResponse(version="0.1.0", ready=True, running=3, workers=[worker])
    status = client.status()
    assert (status.version, status.ready, status.running, status.queued) == ("0.1.0", True, 3, 0)
    assert (status.workers[0].name, status.workers[0].free_blocks) == ("decode-0", 7)


def test_tokenize_and_detokenize(client: Client) -> None:
    assert client.tokenize("ab") == (1, 97, 98)
    assert client.tokenize("ab", add_special_tokens=False) == (97, 98)
    assert client.detokenize([1, 97, 98], skip_special_tokens=True) == "ab"


def test_the_client_loads_neither_torch_nor_ray() -> None:
    code = "import sys, baton.client; print({'torch', 'ray', 'transformers'} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"
