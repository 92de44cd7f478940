"""A user's day with a cluster of real processes: two workers of each role, streams, cancels, nonsense."""

from __future__ import annotations

import asyncio
import pathlib
import socket
import urllib.request
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from baton.client import AsyncClient, Client
from baton.errors import (
    BatonError,
    DeadlineError,
    DuplicateRequestError,
    InvalidRequestError,
    ModelNotFoundError,
)
from baton.requests import FinishReason
from tests.cluster.harness import ClusterUnderTest, running_cluster
from tests.cluster.inprocess import assert_idle
from tests.cluster.oracle import Oracle, prompt_of
from tests.engine.checkpoints import MAX_MODEL_LEN, VOCAB_SIZE, make_checkpoint

pytestmark = pytest.mark.clusters


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def oracle(model: pathlib.Path) -> Oracle:
    return Oracle(model)


@pytest.fixture(scope="module")
def cluster(model: pathlib.Path) -> Iterator[ClusterUnderTest]:
    with running_cluster(model, prefill_workers=2, decode_workers=2) as cluster:
        yield cluster


@pytest.fixture
def client(cluster: ClusterUnderTest) -> Iterator[Client]:
    """A client; after each test every block of every pool must be free."""
    with Client(cluster.target) as client:
        yield client
        assert_idle(client)


GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}


class TestAnswers:
    async def test_concurrent_streams_of_all_kinds_equal_transformers(
        self, client: Client, cluster: ClusterUnderTest, oracle: Oracle
    ) -> None:
        lengths = [1, 15, 16, 17, 32, 100, 333, 1000]
        async with AsyncClient(cluster.target) as aio:

            async def run(seed: int, length: int) -> tuple[list[int], list[int]]:
                completion = await aio.generate(prompt_of(length, seed), max_tokens=24, temperature=0.0)
                return list(completion.choices[0].token_ids), prompt_of(length, seed)

            results = await asyncio.gather(*(run(s, n) for s, n in enumerate(lengths * 3)))
        for token_ids, prompt in results:
            assert token_ids == oracle.generate(prompt, 24)

    def test_text_is_the_detokenised_tokens_and_comes_in_pieces(self, client: Client) -> None:
        deltas = list(client.stream("The baton passes from runner to runner. " * 20, max_tokens=30, **GREEDY))
        token_ids = [token for delta in deltas for choice in delta.choices for token in choice.token_ids]
        assert len(token_ids) == 30
        assert len(deltas) > 10
        text = "".join(delta.text for delta in deltas)
        assert text == client.detokenize(token_ids, skip_special_tokens=True)
        assert deltas[-1].usage is not None
        assert deltas[-1].timings is not None
        assert deltas[-1].timings.prefill_worker.startswith("prefill-")

    def test_a_seed_gives_the_same_samples_on_any_worker_and_in_any_batch(self, client: Client) -> None:
        options: dict[str, Any] = {"temperature": 1.0, "seed": 42, "n": 3, "max_tokens": 16, "ignore_eos": True}
        alone = client.generate(prompt_of(50), **options)
        again = [client.generate(prompt_of(50), cache_salt=str(salt), **options) for salt in range(3)]
        for completion in again:
            assert [c.token_ids for c in completion.choices] == [c.token_ids for c in alone.choices]
        assert len({choice.token_ids for choice in alone.choices}) == 3

    def test_a_stop_string_across_token_borders_ends_the_text_before_it(self, client: Client) -> None:
        options = {"max_tokens": 40, **GREEDY}
        whole = client.generate("Over the bridge, through the forest", **options).choices[0]
        pieces = [delta.text for delta in client.stream("Over the bridge, through the forest", **options)]
        # A stop that begins in the middle of one piece and ends in another.
        start = len("".join(pieces[:6])) - 1
        stop = whole.text[start : start + 6]
        expected = whole.text[: whole.text.index(stop)]
        stopped = client.generate("Over the bridge, through the forest", stop=stop, **options).choices[0]
        assert stopped.text == expected
        assert stopped.finish_reason is FinishReason.STOP
        assert stopped.matched_stop == stop

    def test_a_first_token_that_ends_the_choice(self, client: Client) -> None:
        first = client.generate(prompt_of(60), max_tokens=1, **GREEDY).choices[0]
        assert len(first.token_ids) == 1
        assert first.finish_reason is FinishReason.LENGTH
        stopped = client.generate(prompt_of(60), stop_token_ids=first.token_ids, max_tokens=9, **GREEDY).choices[0]
        assert stopped.token_ids == first.token_ids
        assert stopped.matched_stop == first.token_ids[0]
        if first.text:
            by_text = client.generate(prompt_of(60), stop=first.text, max_tokens=9, **GREEDY).choices[0]
            assert by_text.text == ""

    def test_logprobs_and_echo(self, client: Client) -> None:
        completion = client.generate(prompt_of(40), max_tokens=5, logprobs=3, echo=True, **GREEDY)
        (choice,) = completion.choices
        assert len(choice.logprobs) == 5
        for token_id, logprobs in zip(choice.token_ids, choice.logprobs, strict=True):
            assert len(logprobs.top) == 3
            # Greedy: the sampled token is the most likely one.
            assert logprobs.top[0] == (token_id, logprobs.sampled)
            assert logprobs.sampled <= 0
        assert completion.prompt is not None
        assert list(completion.prompt.token_ids) == prompt_of(40)

    def test_the_longest_prompt_that_is_allowed(self, client: Client, oracle: Oracle) -> None:
        prompt = prompt_of(MAX_MODEL_LEN - 4)
        completion = client.generate(prompt, **GREEDY)
        assert completion.usage.completion_tokens == 4
        assert list(completion.choices[0].token_ids)[:1] == oracle.generate(prompt, 1)


class TestPrefixCache:
    def test_the_second_turn_goes_to_the_worker_of_the_first_and_computes_the_new_tokens_only(
        self, client: Client
    ) -> None:
        first_prompt = prompt_of(200, seed=77)
        first = client.generate(first_prompt, max_tokens=40, **GREEDY)
        second = client.generate(
            [*first_prompt, *first.choices[0].token_ids, *prompt_of(10, seed=78)], max_tokens=4, **GREEDY
        )
        assert second.timings.decode_worker == first.timings.decode_worker
        assert second.timings.local_prefill
        # 239 tokens have KV: 14 full blocks of 16.
        assert second.usage.cached_tokens == 224

    def test_another_salt_never_hits(self, client: Client) -> None:
        prompt = prompt_of(200, seed=80)
        client.generate(prompt, max_tokens=4, cache_salt="a", **GREEDY)
        assert client.generate(prompt, max_tokens=4, cache_salt="b", **GREEDY).usage.cached_tokens == 0
        assert client.generate(prompt, max_tokens=4, cache_salt="a", **GREEDY).usage.cached_tokens > 0

    async def test_a_prompt_that_many_share_is_computed_once_on_a_worker(
        self, client: Client, cluster: ClusterUnderTest
    ) -> None:
        before = metric(cluster, "prefill", 'baton_computed_tokens_total{kind="prefill"}')
        shared = prompt_of(960, seed=90)
        async with AsyncClient(cluster.target) as aio:
            await asyncio.gather(
                *(aio.generate([*shared, *prompt_of(40, seed)], max_tokens=2, **GREEDY) for seed in range(6))
            )
        after = metric(cluster, "prefill", 'baton_computed_tokens_total{kind="prefill"}')
        # Two workers may each compute it once; six times would be 6,000 tokens.
        assert sum(after) - sum(before) <= 2 * 960 + 6 * 40


class TestStreams:
    def test_a_long_prompt_does_not_stall_running_streams(self, client: Client, cluster: ClusterUnderTest) -> None:
        streams = [client.stream(prompt_of(60, seed), max_tokens=1900, **GREEDY) for seed in range(4)]
        for stream in streams:
            for _ in range(3):
                next(stream)
        decoded, prefilled = (metric(cluster, role, "baton_step_seconds_count") for role in ("decode", "prefill"))
        first = next(client.stream(prompt_of(2044, seed=91), max_tokens=2, **GREEDY))
        assert first.choices
        decoded_then, prefilled_then = (
            metric(cluster, role, "baton_step_seconds_count") for role in ("decode", "prefill")
        )
        num_prefill_steps = sum(prefilled_then) - sum(prefilled)
        assert num_prefill_steps >= 2044 // 512
        # Each decode worker with streams goes on at its own pace: many steps for each one of the prefill worker.
        assert sum(decoded_then) - sum(decoded) > num_prefill_steps
        for stream in streams:
            stream.close()


class TestLeaving:
    def test_closing_a_stream_mid_decode_frees_everything(self, client: Client) -> None:
        stream = client.stream(prompt_of(100), max_tokens=1500, **GREEDY)
        for _ in range(5):
            next(stream)
        stream.close()

    async def test_cancelling_while_it_is_queued_prefilled_or_transferred(
        self, client: Client, cluster: ClusterUnderTest
    ) -> None:
        async with AsyncClient(cluster.target) as aio:
            tasks = [
                asyncio.create_task(aio.generate(prompt_of(1900, seed), max_tokens=50, **GREEDY)) for seed in range(12)
            ]
            # The first answer tells that others are under way in every stage.
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def test_a_deadline_ends_the_request_with_its_status(self, client: Client) -> None:
        with pytest.raises(DeadlineError):
            client.generate(prompt_of(100), max_tokens=1900, timeout_s=0.3, **GREEDY)

    def test_a_client_that_vanishes(self, client: Client, cluster: ClusterUnderTest) -> None:
        gone = Client(cluster.target)
        stream = gone.stream(prompt_of(100), max_tokens=1500, **GREEDY)
        next(stream)
        gone.close()
        with pytest.raises(BatonError):
            list(stream)

    def test_a_duplicate_request_id_is_refused_while_the_first_runs(self, client: Client) -> None:
        stream = client.stream(prompt_of(50), max_tokens=1500, request_id="mine", **GREEDY)
        next(stream)
        with pytest.raises(DuplicateRequestError):
            client.generate(prompt_of(50), request_id="mine")
        stream.close()


class TestNonsense:
    @pytest.mark.parametrize(
        ("options", "field", "limit"),
        [
            ({"max_tokens": 0}, "max_tokens", "at least 1"),
            ({"max_tokens": 5000}, "max_tokens", str(MAX_MODEL_LEN)),
            ({"temperature": float("nan")}, "temperature", "at least 0"),
            ({"temperature": -1.0}, "temperature", "at least 0"),
            ({"top_p": 0.0}, "top_p", "above 0 and at most 1"),
            ({"top_p": 1.5}, "top_p", "above 0 and at most 1"),
            ({"min_p": 2.0}, "min_p", "from 0 to 1"),
            ({"repetition_penalty": 0.0}, "repetition_penalty", "above 0"),
            ({"presence_penalty": 3.0}, "presence_penalty", "from -2 to 2"),
            ({"n": 0}, "n", "from 1 to 16"),
            ({"n": 1000}, "n", "from 1 to 16"),
            ({"logprobs": 1000}, "logprobs", "at most 20"),
            ({"stop": ["x"] * 17}, "stop", "at most 16"),
            ({"stop": [""]}, "stop", "1 to 1024"),
            ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids", str(VOCAB_SIZE)),
            ({"logit_bias": {VOCAB_SIZE: 1.0}}, "logit_bias", str(VOCAB_SIZE)),
            ({"min_tokens": 20, "max_tokens": 10}, "min_tokens", "at most max_tokens 10"),
        ],
    )
    def test_a_bad_field_is_named_with_its_limit(
        self, client: Client, options: dict[str, Any], field: str, limit: str
    ) -> None:
        with pytest.raises(InvalidRequestError) as caught:
            client.generate(prompt_of(10), **options)
        assert caught.value.field == f"sampling.{field}"
        assert limit in caught.value.message

    @pytest.mark.parametrize("prompt", ["", [], [VOCAB_SIZE], prompt_of(MAX_MODEL_LEN), prompt_of(MAX_MODEL_LEN + 1)])
    def test_a_bad_prompt_is_refused(self, client: Client, prompt: str | list[int]) -> None:
        with pytest.raises(InvalidRequestError) as caught:
            client.generate(prompt)
        assert caught.value.field in ("prompt", "token_ids")

    def test_an_unknown_model(self, client: Client) -> None:
        with pytest.raises(ModelNotFoundError, match="tiny-llama"):
            client.generate("hello", model="gpt-17")

    def test_a_message_over_the_size_limit(self, client: Client) -> None:
        with pytest.raises(BatonError):
            client.generate("x" * (17 << 20))
        assert client.generate("hello", max_tokens=1).usage.completion_tokens == 1

    def test_bytes_that_are_not_the_protocol(self, client: Client, cluster: ClusterUnderTest) -> None:
        host, port = cluster.target.split(":")
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(b"\x00\xff" * 1000)
            raw.shutdown(socket.SHUT_WR)
            while raw.recv(4096):
                pass
        with grpc.insecure_channel(cluster.target) as channel:
            call: Any = channel.unary_stream("/baton.v1.Inference/Generate")
            with pytest.raises(grpc.RpcError):
                list(call(b"\xff\xff\xff not a message"))
        assert client.generate("hello", max_tokens=1).usage.completion_tokens == 1


class TestOperations:
    def test_health_readiness_and_metrics(self, client: Client, cluster: ClusterUnderTest) -> None:
        client.generate(prompt_of(100, seed=5), max_tokens=4, **GREEDY)
        for path in ("/health", "/ready"):
            with urllib.request.urlopen(cluster.url + path) as answer:
                assert answer.status == 200
        metrics = read(cluster.url + "/metrics")
        assert "baton_time_to_first_token_seconds_count" in metrics
        workers = {worker["name"]: worker for worker in cluster.description["workers"]}
        assert sorted(workers) == ["decode-0", "decode-1", "prefill-0", "prefill-1"]
        assert sum(metric(cluster, "prefill", 'baton_kv_sent_bytes_total{transport="shm"}')) > 0
        assert sum(metric(cluster, "decode", 'baton_kv_received_bytes_total{transport="shm"}')) > 0

    def test_model_info_and_status(self, client: Client) -> None:
        info = client.model_info()
        assert (info.name, info.vocab_size, info.max_model_len) == ("tiny-llama", VOCAB_SIZE, MAX_MODEL_LEN)
        status = client.status()
        assert status.ready
        assert all(worker.healthy for worker in status.workers)


def metric(cluster: ClusterUnderTest, role: str, series: str) -> list[float]:
    """A series of each worker of a role."""
    values = []
    for worker in cluster.description["workers"]:
        if worker["role"] == role:
            lines = read(f"http://{worker['metrics']}/metrics").splitlines()
            values += [float(line.split()[-1]) for line in lines if line.startswith(series)]
    return values


def read(url: str) -> str:
    with urllib.request.urlopen(url) as answer:
        text: str = answer.read().decode()
        return text
