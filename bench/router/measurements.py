"""What is measured of the router: the time that it adds, its CPU time for each token and request, and its memory.

CPU times are those of the router's process, read from the operating system: they hold whatever else the machine does,
which wall times do not. Blocking calls that read them take microseconds, so they are made on the event loop.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import statistics
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Self

import grpc.aio

from baton.errors import InvalidRequestError
from baton.internal.v1 import worker_pb2, worker_pb2_grpc
from baton.requests import AttemptRef, RequestSpec, SamplingParams
from baton.wire import spec_to_wire
from bench.checkpoint import sentences
from bench.router.clients import StreamClient
from bench.router.processes import VOCAB_SIZE, Child

# Tokens of each stream before and after those that are counted: requests begin and end there.
_MARGIN_TOKENS = 8


class Prompts:
    """Texts that differ from their first words on, of about `num_words` words each."""

    def __init__(self, num_words: int = 32) -> None:
        self._words = [word for sentence in sentences(VOCAB_SIZE, seed=0) for word in sentence.split()]
        self._num_words = num_words
        self._random = random.Random(0)

    def __iter__(self) -> Iterator[str]:
        while True:
            yield " ".join(self._random.choices(self._words, k=self._num_words))


@dataclasses.dataclass(frozen=True, slots=True)
class Latencies:
    """Of requests one at a time, in milliseconds."""

    p50_ms: float
    p99_ms: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Self:
        ranked = sorted(seconds)
        return cls(1e3 * statistics.median(ranked), 1e3 * ranked[round(0.99 * (len(ranked) - 1))])


@dataclasses.dataclass(frozen=True, slots=True)
class Streaming:
    """Many streams at a time.

    Attributes:
        cpu_us_per_token: CPU time of the server in microseconds, from when all streams have begun until one ends.
        messages_per_token: below 1 where tokens came together.
        load: share of one core that the server used.
    """

    cpu_us_per_token: float
    messages_per_token: float
    load: float


@dataclasses.dataclass(frozen=True, slots=True)
class Serving:
    """Requests from the first to the last of a load, as many at a time as it has streams."""

    num_requests: int
    requests_per_s: float
    tokens_per_s: float
    cpu_ms_per_request: float
    cpu_us_per_token: float
    load: float
    rss_bytes: int


class _Moment(NamedTuple):
    """Of a run of streams: the server's CPU time, the time, and messages that have arrived."""

    cpu_s: float
    at_s: float
    num_messages: int


class DirectWorkers:
    """The mock workers asked as the router asks them, by one who knows already where a request goes.

    Args:
        prefill, decode: "host:port".
    """

    def __init__(self, prefill: str, decode: str) -> None:
        self._channels = [grpc.aio.insecure_channel(address) for address in (prefill, decode)]
        self._prefill: worker_pb2_grpc.PrefillWorkerAsyncStub = worker_pb2_grpc.PrefillWorkerStub(self._channels[0])
        self._decode: worker_pb2_grpc.DecodeWorkerAsyncStub = worker_pb2_grpc.DecodeWorkerStub(self._channels[1])

    async def ttft_s(self, prompt_token_ids: Sequence[int]) -> float:
        """Seconds from the call of Reserve to the first token of one that generates no other."""
        spec = spec_to_wire(
            RequestSpec(
                ref=AttemptRef(uuid.uuid4().hex, 1),
                router_id="bench",
                prompt_token_ids=tuple(prompt_token_ids),
                sampling=SamplingParams(max_tokens=1, temperature=0.0),
            )
        )
        started = time.perf_counter()
        reserved = await self._decode.Reserve(worker_pb2.ReserveRequest(spec=spec))
        call = self._prefill.Prefill(worker_pb2.PrefillRequest(spec=spec, ticket=reserved.ticket))
        first_s = 0.0
        async for event in call:
            if event.WhichOneof("event") == "first_tokens":
                first_s = time.perf_counter() - started
        return first_s

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()


async def ttft_s(client: StreamClient, prompt: str) -> float:
    """Seconds from the request to its first token."""
    started = time.perf_counter()
    times: list[float] = []
    await client.stream(prompt, 2, lambda: times.append(time.perf_counter()))
    return times[0] - started


async def measure_streaming(
    server: Child, client: StreamClient, prompts: Iterator[str], *, num_streams: int, num_tokens: int
) -> Streaming:
    """CPU time for each token while `num_streams` streams are under way, less how requests begin and end."""
    received = [0] * num_streams
    began: _Moment | None = None
    ended: _Moment | None = None

    def on_message(index: int) -> Callable[[], None]:
        def count() -> None:
            nonlocal began, ended
            received[index] += 1
            if ended is None and received[index] >= num_tokens - _MARGIN_TOKENS:
                ended = _Moment(server.cpu_s(), time.perf_counter(), sum(received))
            elif began is None and ended is None and min(received) >= _MARGIN_TOKENS:
                began = _Moment(server.cpu_s(), time.perf_counter(), sum(received))

        return count

    await asyncio.gather(*(client.stream(next(prompts), num_tokens, on_message(index)) for index in range(num_streams)))
    if began is None or ended is None:
        raise InvalidRequestError("--tokens", f"{num_tokens} are over before all of {num_streams} streams have begun")
    cpu_s, num_messages = ended.cpu_s - began.cpu_s, ended.num_messages - began.num_messages
    return Streaming(
        cpu_us_per_token=1e6 * cpu_s / num_messages,
        messages_per_token=sum(received) / (num_streams * num_tokens),
        load=cpu_s / (ended.at_s - began.at_s),
    )


async def measure_serving(
    router: Child,
    clients: Sequence[StreamClient],
    prompts: Iterator[str],
    *,
    num_requests: int,
    num_streams: int,
    num_tokens: int,
) -> Serving:
    """`num_requests` requests, dealt out to the clients in turn, `num_streams` of them at a time."""
    started, cpu_before = time.perf_counter(), router.cpu_s()
    todo = iter(range(num_requests))

    async def work(client: StreamClient) -> None:
        for _ in todo:
            await client.stream(next(prompts), num_tokens, _nothing)

    await asyncio.gather(*(work(clients[index % len(clients)]) for index in range(num_streams)))
    duration_s, cpu_s = time.perf_counter() - started, router.cpu_s() - cpu_before
    return Serving(
        num_requests=num_requests,
        requests_per_s=num_requests / duration_s,
        tokens_per_s=num_requests * num_tokens / duration_s,
        cpu_ms_per_request=1e3 * cpu_s / num_requests,
        cpu_us_per_token=1e6 * cpu_s / (num_requests * num_tokens),
        load=cpu_s / duration_s,
        rss_bytes=router.rss_bytes(),
    )


def _nothing() -> None:
    """Nobody counts."""
