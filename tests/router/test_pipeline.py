"""A request's life against mock workers over real sockets; test_recovery_flow.py has the unhappy ones."""

from __future__ import annotations

import asyncio
import contextlib

import grpc
import pytest
from tokenizers import Tokenizer

from baton.hashing import extend_chain, model_identity, root_hash
from baton.v1 import inference_pb2
from bench.mock_workers.cluster import MockCluster
from bench.mock_workers.worker import BLOCK_SIZE, Script, fingerprint
from tests.router.conftest import EOS, StartRouter, next_of, request_of, responses_of, rest_of, text_of, tokens_of


def saying(tokenizer: Tokenizer, text: str) -> Script:
    """A model that says `text` and ends."""
    ids = [*tokenizer.encode(text, add_special_tokens=False).ids, EOS]
    return lambda choice, position: ids[position]


async def test_a_remote_prefill_streams_the_tokens_of_both_workers(start_router: StartRouter) -> None:
    async with MockCluster() as cluster, start_router(cluster) as client:
        responses = await client.generate(request_of(max_tokens=10, request_id="mine"))
        assert tokens_of(responses) == [40 + position for position in range(10)]
        assert {response.request_id for response in responses} == {"mine"}
        assert [response.HasField("usage") for response in responses] == [False] * (len(responses) - 1) + [True]
        last = responses[-1]
        assert last.choices[-1].finish_reason == inference_pb2.FINISH_REASON_LENGTH
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (15, 10)
        assert (last.timings.prefill_worker, last.timings.decode_worker) == ("prefill-0", "decode-0")
        assert (last.timings.prefill_s, last.timings.transfer_s, last.timings.decode_s) == (0.125, 0.5, 0.25)
        assert last.timings.attempts == 1
        assert not last.timings.local_prefill
        assert cluster.prefill[0].requests[0].ticket.worker == "decode-0"


@pytest.mark.parametrize("num_tokens", [1, 5])
async def test_a_short_prompt_is_prefilled_by_the_decode_worker(start_router: StartRouter, num_tokens: int) -> None:
    """Also where it is all there is to do."""
    async with MockCluster() as cluster, start_router(cluster, decode={"local_prefill_tokens": 32}) as client:
        cluster.decode[0].cached_tokens = 16
        responses = await client.generate(request_of([7] * 20, max_tokens=num_tokens))
        assert tokens_of(responses) == [40, 41, 42, 43, 44][:num_tokens]
        assert responses[-1].timings.local_prefill
        assert responses[-1].timings.prefill_s == 0.003
        assert responses[-1].timings.prefill_worker == ""
        assert responses[-1].usage.cached_tokens == 16
        assert cluster.decode[0].reserves[0].local_prefill
        assert cluster.prefill[0].requests == []


async def test_without_a_prefill_worker_the_decode_worker_prefills(start_router: StartRouter) -> None:
    async with MockCluster() as cluster, start_router(cluster) as client:
        prefill = cluster.prefill[0]
        await cluster.remove(prefill)
        await prefill.stop()
        await client.until_status(lambda status: not status.ready)
        responses = await client.generate(request_of([7] * 100, max_tokens=5))
        assert tokens_of(responses) == [40, 41, 42, 43, 44]
        assert responses[-1].timings.local_prefill


async def test_the_spec_carries_hashes_defaults_and_what_was_asked(start_router: StartRouter) -> None:
    async with MockCluster() as cluster, start_router(cluster, decode={"max_unacked_tokens": 77}) as client:
        request = request_of([9] * 40, max_tokens=3, temperature=0.5, cache_salt="tenant", priority=-2, seed=11)
        await client.generate(request, timeout_s=20)
        spec = cluster.decode[0].reserves[0].spec
        root = root_hash(model_identity(fingerprint()), "tenant")
        assert spec.salt_root == root
        assert list(spec.block_hashes) == extend_chain(root, [9] * 40, BLOCK_SIZE)
        assert len(spec.block_hashes) == 2
        assert (spec.sampling.temperature, spec.sampling.top_k, spec.sampling.seed) == (0.5, 7, 11)
        assert list(spec.sampling.eos_token_ids) == [EOS]
        assert (spec.priority, spec.max_unacked_tokens, spec.ref.attempt) == (-2, 77, 1)
        assert 15 < spec.timeout_s < 21
        assert not spec.delivered
        assert cluster.prefill[0].requests[0].spec == spec


async def test_without_a_deadline_none_is_sent(start_router: StartRouter) -> None:
    async with MockCluster() as cluster, start_router(cluster) as client:
        await client.generate(request_of(max_tokens=1), timeout_s=None)
        assert not cluster.decode[0].reserves[0].spec.HasField("timeout_s")


async def test_text_ends_before_eos(start_router: StartRouter, tokenizer: Tokenizer) -> None:
    async with MockCluster(script=saying(tokenizer, "naïve 日本語 🙂")) as cluster, start_router(cluster) as client:
        responses = await client.generate(request_of())
        assert text_of(responses) == "naïve 日本語 🙂"
        assert tokens_of(responses)[-1] == EOS
        assert responses[-1].choices[-1].stop_token_id == EOS


async def test_echo_sends_the_prompt_back_first(start_router: StartRouter) -> None:
    async with MockCluster() as cluster, start_router(cluster) as client:
        responses = await client.generate(request_of("hello", max_tokens=4, echo=True))
        assert responses[0].prompt.text == "hello"
        assert len(responses[0].prompt.token_ids) == 2
        assert not any(response.HasField("prompt") for response in responses[1:])


async def test_logprobs_come_one_for_each_token(start_router: StartRouter) -> None:
    async with MockCluster() as cluster, start_router(cluster) as client:
        responses = await client.generate(request_of(max_tokens=4, logprobs=2))
        positions = [entry for response in responses for delta in response.choices for entry in delta.logprobs]
        assert [entry.sampled.token_id for entry in positions] == tokens_of(responses)
        assert all(len(entry.top) == 2 for entry in positions)


async def test_choices_stream_side_by_side(start_router: StartRouter) -> None:
    async with MockCluster() as cluster, start_router(cluster) as client:
        responses = await client.generate(request_of(max_tokens=6, n=3, temperature=0.0))
        for choice in range(3):
            assert tokens_of(responses, choice) == [40 + choice + position for position in range(6)]
        assert responses[-1].usage.completion_tokens == 18


async def test_a_stop_string_ends_the_request_and_cancels_the_decode_worker(
    start_router: StartRouter, tokenizer: Tokenizer
) -> None:
    script = saying(tokenizer, "hello world, and so on and on and on")
    async with MockCluster(script=script) as cluster, start_router(cluster) as client:
        responses = await client.generate(request_of(stop=["rld, a"]))
        assert text_of(responses) == "hello wo"
        assert responses[-1].choices[-1].stop_text == "rld, a"
        assert responses[-1].HasField("usage")
        await cluster.decode[0].until(lambda: (0, 1) in cluster.decode[0].cancelled)


async def test_a_request_that_ends_by_itself_is_not_cancelled(start_router: StartRouter) -> None:
    async with MockCluster() as cluster, start_router(cluster) as client:
        decode = cluster.decode[0]
        await client.generate(request_of(max_tokens=8))
        await decode.until(lambda: ((0, 1), 0, 8) in decode.acks)
        assert decode.cancelled == []
        assert cluster.prefill[0].cancelled == []


async def test_a_first_token_that_ends_the_request_releases_the_reservation(start_router: StartRouter) -> None:
    async with MockCluster() as cluster, start_router(cluster) as client:
        cluster.prefill[0].commit_gate.clear()
        responses = await client.generate(request_of(max_tokens=1))
        assert tokens_of(responses) == [40]
        await cluster.decode[0].until(lambda: (0, 1) in cluster.decode[0].cancelled)
        await cluster.prefill[0].until(lambda: (0, 1) in cluster.prefill[0].cancelled)


async def test_the_first_token_comes_before_the_transfer_ends(start_router: StartRouter) -> None:
    async with MockCluster() as cluster, start_router(cluster) as client:
        cluster.prefill[0].commit_gate.clear()
        call = client.stream(request_of(max_tokens=3))
        assert tokens_of([await next_of(call)]) == [40]
        cluster.prefill[0].commit_gate.set()
        assert tokens_of(await rest_of(call)) == [41, 42]


async def test_decode_tokens_wait_for_the_prefill_worker_s_first(start_router: StartRouter) -> None:
    async with MockCluster() as cluster, start_router(cluster) as client:
        prefill, decode = cluster.prefill[0], cluster.decode[0]
        prefill.first_gate.clear()
        call = client.stream(request_of(max_tokens=4))
        await prefill.until(lambda: prefill.requests)
        # The decode worker runs ahead: its tokens are there before the first.
        decode.reservations[0, 1].next_position[0] = decode.reservations[0, 1].acked[0] = 1
        decode.commit((0, 1))
        await decode.until(lambda: decode.reservations[0, 1].finished[0])
        first = asyncio.ensure_future(next_of(call))
        await asyncio.sleep(0.05)
        assert not first.done()
        prefill.first_gate.set()
        responses = [await first, *(await rest_of(call))]
        assert tokens_of(responses) == [40, 41, 42, 43]


async def test_a_duplicate_id_is_refused_while_the_first_runs(start_router: StartRouter) -> None:
    async with MockCluster() as cluster, start_router(cluster) as client:
        cluster.decode[0].step_gate.clear()
        call = client.stream(request_of(max_tokens=4, request_id="same"))
        await next_of(call)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.generate(request_of(request_id="same"))
        assert caught.value.code() == grpc.StatusCode.ALREADY_EXISTS
        cluster.decode[0].step_gate.set()
        assert len(tokens_of(await rest_of(call))) == 3
        await client.generate(request_of(max_tokens=2, request_id="same"))


async def test_a_full_queue_is_resource_exhausted(start_router: StartRouter) -> None:
    async with MockCluster() as cluster, start_router(cluster, router={"max_queued_requests": 1}) as client:
        cluster.decode[0].publish(running=1, free_blocks=0)
        first = client.stream(request_of(max_tokens=2))
        await client.until_status(lambda status: status.queued)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.generate(request_of())
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        cluster.decode[0].publish(free_blocks=64)
        assert len(tokens_of(await rest_of(first))) == 2


async def test_a_slow_client_pauses_only_itself(start_router: StartRouter) -> None:
    """Tokens that the client has not taken are not acknowledged, and the worker stops at the limit."""
    async with MockCluster() as cluster, start_router(cluster, decode={"max_unacked_tokens": 8}) as client:
        decode = cluster.decode[0]
        pipeline = client.server.pipeline
        async with contextlib.aclosing(responses_of(pipeline, request_of(max_tokens=50))) as slow:
            taken = tokens_of([await anext(slow)])
            await decode.until(lambda: (0, 1) in decode.reservations)
            slow_one = decode.reservations[0, 1]
            await decode.until(lambda: slow_one.committed and slow_one.num_unacked(0) == 8)
            assert len(tokens_of(await client.generate(request_of(max_tokens=50)))) == 50
            assert slow_one.num_unacked(0) == 8
            async for response in slow:
                taken += tokens_of([response])
        assert len(taken) == 50


async def test_a_choice_that_a_stop_string_ends_is_ended_at_its_worker_too(start_router: StartRouter) -> None:
    async with MockCluster() as cluster, start_router(cluster, decode={"max_unacked_tokens": 8}) as client:
        cluster.script = lambda choice, position: 90 if choice else 40 + position
        decode = cluster.decode[0]
        whole = text_of(await client.generate(request_of(max_tokens=6)))
        request = request_of(max_tokens=50, n=2, stop=[whole[2:4]])
        async with contextlib.aclosing(responses_of(client.server.pipeline, request)) as responses:
            taken = [await anext(responses)]
            while not any(delta.stop_text for delta in taken[-1].choices):
                taken.append(await anext(responses))
            # While the client takes nothing more, the other choice waits at its limit.
            next_one = asyncio.ensure_future(anext(responses))
            await decode.until(lambda: decode.ended)
            taken.append(await next_one)
            taken += [response async for response in responses]
        assert decode.ended == [((1, 1), 0)]
        assert text_of(taken) == whole[:2]
        assert len(tokens_of(taken, 1)) == 50


async def test_acknowledgements_are_batched(start_router: StartRouter) -> None:
    async with MockCluster() as cluster, start_router(cluster) as client:
        decode = cluster.decode[0]
        await asyncio.gather(*(client.generate(request_of(max_tokens=40)) for _ in range(5)))
        await decode.until(lambda: sum(position == 40 for *_, position in decode.acks) == 5)
        assert decode.num_ack_messages < 5 * 40 / 2


class TestRelease:
    """Whoever goes away leaves nothing behind at either worker."""

    async def test_cancel_while_decoding(self, start_router: StartRouter) -> None:
        async with MockCluster(step_s=0.005) as cluster, start_router(cluster) as client:
            call = client.stream(request_of(max_tokens=400))
            await next_of(call)
            call.cancel()
            await cluster.decode[0].until(lambda: (0, 1) in cluster.decode[0].cancelled)
            assert client.server.pipeline.num_running == 0

    async def test_cancel_during_prefill(self, start_router: StartRouter) -> None:
        async with MockCluster() as cluster, start_router(cluster) as client:
            prefill, decode = cluster.prefill[0], cluster.decode[0]
            prefill.first_gate.clear()
            call = client.stream(request_of())
            await prefill.until(lambda: prefill.requests)
            call.cancel()
            await prefill.until(lambda: (0, 1) in prefill.cancelled)
            await decode.until(lambda: (0, 1) in decode.cancelled)

    async def test_cancel_while_the_reservation_is_on_its_way(self, start_router: StartRouter) -> None:
        async with MockCluster() as cluster, start_router(cluster) as client:
            decode = cluster.decode[0]
            decode.reserve_gate.clear()
            call = client.stream(request_of())
            await decode.until(lambda: decode.reserves)
            call.cancel()
            await decode.until(lambda: (0, 1) in decode.cancelled)
            decode.reserve_gate.set()
            assert decode.reservations == {}

    async def test_a_client_that_vanishes(self, start_router: StartRouter) -> None:
        async with MockCluster(step_s=0.005) as cluster, start_router(cluster) as client:
            channel = grpc.aio.insecure_channel(client.server.grpc_address)
            call = type(client)(client.server, channel).stream(request_of(max_tokens=400))
            await next_of(call)
            await channel.close(None)
            await cluster.decode[0].until(lambda: (0, 1) in cluster.decode[0].cancelled)

    async def test_a_deadline_while_decoding(self, start_router: StartRouter) -> None:
        async with MockCluster(step_s=0.005) as cluster, start_router(cluster) as client:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await client.generate(request_of(max_tokens=400), timeout_s=0.3)
            assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            await cluster.decode[0].until(lambda: (0, 1) in cluster.decode[0].cancelled)

    @pytest.mark.parametrize("stuck", ["queue", "reserve", "prefill"])
    async def test_a_deadline_that_the_router_keeps_by_itself(self, start_router: StartRouter, stuck: str) -> None:
        """Not every API has deadlines of its own."""
        async with MockCluster() as cluster, start_router(cluster) as client:
            prefill, decode = cluster.prefill[0], cluster.decode[0]
            if stuck == "queue":
                decode.publish(running=1, free_blocks=0)
            elif stuck == "reserve":
                decode.reserve_gate.clear()
            else:
                prefill.first_gate.clear()
            await client.stub.GetClusterStatus(inference_pb2.GetClusterStatusRequest())
            with pytest.raises(Exception, match="the client's deadline passed"):
                await anext(responses_of(client.server.pipeline, request_of(), timeout_s=0.2))
            assert client.server.pipeline.num_running == 0
            if stuck != "queue":
                await decode.until(lambda: (0, 1) in decode.cancelled)

    async def test_leases_are_renewed_in_batches_while_requests_run(self, start_router: StartRouter) -> None:
        async with MockCluster() as cluster, start_router(cluster, transfer={"lease_s": 0.3}) as client:
            prefill, decode = cluster.prefill[0], cluster.decode[0]
            prefill.first_gate.clear()
            calls = [client.stream(request_of(max_tokens=3)) for _ in range(2)]
            await decode.until(lambda: {(0, 1), (1, 1)} <= set(decode.renewed))
            await prefill.until(lambda: {(0, 1), (1, 1)} <= set(prefill.renewed))
            prefill.first_gate.set()
            for call in calls:
                assert len(tokens_of(await rest_of(call))) == 3


async def test_cached_tokens_are_those_of_the_prefill_worker(start_router: StartRouter) -> None:
    async with MockCluster() as cluster, start_router(cluster) as client:
        cluster.prefill[0].cached_tokens = 12
        responses = await client.generate(request_of(max_tokens=3))
        assert responses[-1].usage.cached_tokens == 12


async def test_an_id_that_a_client_uses_again_is_another_request_to_workers(start_router: StartRouter) -> None:
    async with MockCluster() as cluster, start_router(cluster) as client:
        decode = cluster.decode[0]
        decode.step_gate.clear()
        call = client.stream(request_of(max_tokens=3, request_id="mine"))
        await next_of(call)
        call.cancel()
        await decode.until(lambda: (0, 1) in decode.cancelled)
        decode.step_gate.set()
        responses = await client.generate(request_of(max_tokens=3, request_id="mine"))
        assert {response.request_id for response in responses} == {"mine"}
        first, second = (reserve.spec.ref for reserve in decode.reserves)
        assert len({"mine", first.request_id, second.request_id}) == 3
        assert (first.attempt, second.attempt) == (1, 1)


async def test_a_request_without_an_id_is_given_one(start_router: StartRouter) -> None:
    async with MockCluster() as cluster, start_router(cluster) as client:
        responses = await client.generate(request_of(max_tokens=3))
        assert len({response.request_id for response in responses}) == 1
        assert len(responses[0].request_id) == 32


@pytest.mark.parametrize("request_id", ["a b", "a\nb", "\x1b[2J", "é", "x" * 129])
async def test_an_id_that_is_not_plain_text_is_refused(start_router: StartRouter, request_id: str) -> None:
    async with MockCluster() as cluster, start_router(cluster) as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.generate(request_of(request_id=request_id))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.details() == "request_id: must have 1 to 128 visible ASCII characters"
        assert len(await client.generate(request_of(request_id="x" * 128, max_tokens=1))) == 1
