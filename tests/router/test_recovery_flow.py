"""What becomes of a request when workers refuse, fail, preempt, or die; mock workers over real sockets."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from baton.hashing import extend_chain
from bench.mock_workers.cluster import MockCluster
from bench.mock_workers.worker import BLOCK_SIZE
from tests.router.conftest import StartRouter, next_of, request_of, rest_of, tokens_of

UNAVAILABLE, ABORTED = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED


async def failure_of(call: grpc.aio.UnaryStreamCall, timeout_s: float = 10.0) -> grpc.aio.AioRpcError:  # type: ignore[type-arg]
    async with asyncio.timeout(timeout_s):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rest_of(call)
    return caught.value


class TestRefusal:
    async def test_the_request_waits_for_the_next_state(self, start_router: StartRouter) -> None:
        async with MockCluster() as cluster, start_router(cluster) as client:
            decode = cluster.decode[0]
            decode.publish(running=1)
            await client.until_status(lambda status: status.workers[1].running)
            decode.refusals = 1
            generated = asyncio.create_task(client.generate(request_of(max_tokens=4)))
            await decode.until(lambda: decode.reserves)
            await asyncio.sleep(0.05)
            assert len(decode.reserves) == 1
            decode.publish()
            responses = await generated
            assert len(tokens_of(responses)) == 4
            assert responses[-1].timings.attempts == 1
            assert [reserve.spec.ref.attempt for reserve in decode.reserves] == [1, 1]
            assert decode.cancelled == []

    async def test_a_state_that_overtook_the_refusal_counts(self, start_router: StartRouter) -> None:
        async with MockCluster() as cluster, start_router(cluster) as client:
            decode = cluster.decode[0]
            decode.publish(running=1)
            await client.until_status(lambda status: status.workers[1].running)
            decode.refusals = 1
            decode.reserve_gate.clear()
            generated = asyncio.create_task(client.generate(request_of(max_tokens=4)))
            await decode.until(lambda: decode.reserves)
            decode.publish(running=2)
            await client.until_status(lambda status: status.workers[1].running == 2)
            decode.reserve_gate.set()
            assert len(tokens_of(await generated)) == 4
            assert len(decode.reserves) == 2

    async def test_an_idle_cluster_is_not_waited_for(self, start_router: StartRouter) -> None:
        async with MockCluster() as cluster, start_router(cluster) as client:
            cluster.decode[0].refusals = 2
            assert len(tokens_of(await client.generate(request_of(max_tokens=4)))) == 4
            assert len(cluster.decode[0].reserves) == 3

    async def test_another_decode_worker_is_asked_at_once(self, start_router: StartRouter) -> None:
        async with MockCluster(num_decode=2) as cluster, start_router(cluster) as client:
            await client.until_connected(3)
            first, second = cluster.decode
            first.refusals = 1
            responses = await client.generate(request_of(max_tokens=4))
            assert (len(first.reserves), len(second.reserves)) == (1, 1)
            assert responses[-1].timings.decode_worker == "decode-1"


class TestPrefillFailure:
    @pytest.mark.parametrize("num_events", [0, 1, 2])
    @pytest.mark.parametrize("status", [UNAVAILABLE, ABORTED])
    async def test_another_attempt_is_made_on_another_worker(
        self, start_router: StartRouter, num_events: int, status: grpc.StatusCode
    ) -> None:
        """Failing before it starts, before its first token, and between first token and commit."""
        async with MockCluster(num_prefill=2) as cluster, start_router(cluster) as client:
            await client.until_connected(3)
            first, second = cluster.prefill
            first.failures = [(num_events, status)]
            first.commit_gate.clear()
            if num_events < 2:
                first.commit_gate.set()
            else:
                first.commit_gate, first.failures = asyncio.Event(), []
            call = client.stream(request_of(max_tokens=5, seed=3))
            if num_events == 2:
                received = tokens_of([await next_of(call)])
                assert received == [40]
                await first.stop()
            else:
                received = []
            responses = await rest_of(call)
            assert received + tokens_of(responses) == [40, 41, 42, 43, 44]
            assert responses[-1].timings.attempts == 2
            assert responses[-1].timings.prefill_worker == "prefill-1"
            assert responses[-1].usage.completion_tokens == 5
            retry = second.requests[0].spec
            assert retry.ref.attempt == 2
            assert retry.sampling.seed == 3
            assert [list(choice.token_ids) for choice in retry.delivered] == ([[40]] if received else [])
            assert (0, 1) in cluster.decode[0].cancelled

    async def test_the_only_worker_is_tried_again_after_a_state(self, start_router: StartRouter) -> None:
        async with MockCluster() as cluster, start_router(cluster) as client:
            prefill, decode = cluster.prefill[0], cluster.decode[0]
            decode.publish(running=1)
            await client.until_status(lambda status: status.workers[1].running)
            prefill.failures = [(1, ABORTED)]
            generated = asyncio.create_task(client.generate(request_of(max_tokens=3)))
            await decode.until(lambda: (0, 1) in decode.cancelled)
            await asyncio.sleep(0.05)
            assert len(prefill.requests) == 1
            decode.publish()
            assert tokens_of(await generated) == [40, 41, 42]
            assert [request.spec.ref.attempt for request in prefill.requests] == [1, 2]

    async def test_what_was_delivered_of_each_choice_is_forced(self, start_router: StartRouter) -> None:
        async with MockCluster(num_prefill=2) as cluster, start_router(cluster) as client:
            await client.until_connected(3)
            first, second = cluster.prefill
            first.commit_gate.clear()
            call = client.stream(request_of(max_tokens=3, n=2))
            received = [await next_of(call)]
            await first.stop()
            responses = received + await rest_of(call)
            assert tokens_of(responses, 0) == [40, 41, 42]
            assert tokens_of(responses, 1) == [41, 42, 43]
            assert [list(choice.token_ids) for choice in second.requests[0].spec.delivered] == [[40], [41]]

    async def test_retries_are_bounded(self, start_router: StartRouter) -> None:
        async with MockCluster() as cluster, start_router(cluster, router={"max_retries": 2}) as client:
            prefill = cluster.prefill[0]
            prefill.failures = [(0, ABORTED)] * 10
            error = await failure_of(client.stream(request_of()))
            assert error.code() == UNAVAILABLE
            assert error.details() == "gave up after 2 retries; the last failure: scripted failure"
            assert len(prefill.requests) == 3

    async def test_every_worker_is_tried_before_one_is_tried_again(self, start_router: StartRouter) -> None:
        async with MockCluster(num_prefill=3) as cluster, start_router(cluster) as client:
            await client.until_connected(4)
            for prefill in cluster.prefill[:2]:
                prefill.failures = [(0, UNAVAILABLE)] * 5
            assert len(tokens_of(await client.generate(request_of(max_tokens=3)))) == 3
            assert [len(prefill.requests) for prefill in cluster.prefill] == [1, 1, 1]

    async def test_a_status_that_no_retry_helps_is_passed_on(self, start_router: StartRouter) -> None:
        async with MockCluster() as cluster, start_router(cluster) as client:
            cluster.prefill[0].failures = [(0, grpc.StatusCode.INTERNAL)]
            error = await failure_of(client.stream(request_of()))
            assert (error.code(), error.details()) == (grpc.StatusCode.INTERNAL, "scripted failure")
            await cluster.decode[0].until(lambda: (0, 1) in cluster.decode[0].cancelled)

    async def test_a_failure_after_the_commit_changes_nothing(self, start_router: StartRouter) -> None:
        async with MockCluster() as cluster, start_router(cluster) as client:
            prefill, decode = cluster.prefill[0], cluster.decode[0]

            def pause_after_two(choice: int, position: int) -> int:
                if position == 2:
                    decode.step_gate.clear()
                return 40 + position

            cluster.script = pause_after_two
            prefill.done_gate.clear()
            call = client.stream(request_of(max_tokens=12))
            received: list[int] = []
            while len(received) < 3:
                received += tokens_of([await next_of(call)])
            await prefill.stop()
            await client.until_status(lambda status: not status.workers[0].healthy)
            decode.step_gate.set()
            responses = await rest_of(call)
            assert received + tokens_of(responses) == list(range(40, 52))
            assert responses[-1].timings.attempts == 1

    async def test_a_lost_lease_is_a_new_attempt(self, start_router: StartRouter) -> None:
        """The prefill worker lives and no longer knows the request, yet its stream says nothing."""
        async with (
            MockCluster(num_prefill=2) as cluster,
            start_router(cluster, transfer={"lease_s": 0.3}) as client,
        ):
            await client.until_connected(3)
            first = cluster.prefill[0]
            first.first_gate.clear()
            first.forgotten.add((0, 1))
            responses = await client.generate(request_of(max_tokens=4))
            assert tokens_of(responses) == [40, 41, 42, 43]
            assert responses[-1].timings.prefill_worker == "prefill-1"
            await first.until(lambda: (0, 1) in first.cancelled)

    async def test_tokens_of_the_old_attempt_are_dropped(self, start_router: StartRouter) -> None:
        """The decode worker commits the first attempt although its prefill worker seemed dead."""
        async with MockCluster(num_prefill=2) as cluster, start_router(cluster) as client:
            await client.until_connected(3)
            first, second = cluster.prefill
            decode = cluster.decode[0]
            decode.on_cancel = lambda name: decode.cancelled.append(name)  # type: ignore[method-assign]
            first.failures = [(0, UNAVAILABLE)]
            second.first_gate.clear()
            generated = asyncio.create_task(client.generate(request_of(max_tokens=4)))
            await second.until(lambda: second.requests)
            stale = decode.reservations[0, 1]
            decode.commit((0, 1))
            await decode.until(lambda: all(stale.finished))
            second.first_gate.set()
            assert tokens_of(await generated) == [40, 41, 42, 43]


class TestPreemption:
    async def test_a_preempted_request_goes_on_in_a_new_attempt(self, start_router: StartRouter) -> None:
        async with MockCluster() as cluster, start_router(cluster, router={"max_retries": 0}) as client:
            decode = cluster.decode[0]
            call = client.stream(request_of(max_tokens=6))
            received: list[int] = []
            decode.step_gate.clear()
            received += tokens_of([await next_of(call)])
            await decode.until(lambda: (0, 1) in decode.reservations)
            decode.preempt((0, 1))
            decode.step_gate.set()
            responses = await rest_of(call)
            assert received + tokens_of(responses) == [40, 41, 42, 43, 44, 45]
            assert responses[-1].timings.attempts == 2
            resumed = decode.reserves[-1].spec
            assert list(resumed.delivered[0].token_ids) == received

    async def test_it_resumes_where_its_blocks_are_still_cached(self, start_router: StartRouter) -> None:
        """Prompt and delivered tokens are found, so that little is lacking and the decode worker prefills that."""
        async with MockCluster() as cluster, start_router(cluster, decode={"local_prefill_tokens": 32}) as client:
            decode = cluster.decode[0]

            def pause_after_forty(choice: int, position: int) -> int:
                if position == 39:
                    decode.step_gate.clear()
                return 50

            cluster.script = pause_after_forty
            call = client.stream(request_of([7] * 40, max_tokens=44))
            received: list[int] = []
            while len(received) < 40:
                received += tokens_of([await next_of(call)])
            first = decode.reserves[0]
            hashes = extend_chain(first.spec.salt_root, [7] * 40 + [50] * 40, BLOCK_SIZE)
            decode.publish(stored=[block_hash + bytes(4) for block_hash in hashes], running=1)
            await client.until_status(lambda status: status.workers[1].running)
            decode.preempt((0, 1))
            decode.step_gate.set()
            assert len(received + tokens_of(await rest_of(call))) == 44
            assert [reserve.local_prefill for reserve in decode.reserves] == [False, True]
            assert decode.reserves[1].spec.block_hashes == first.spec.block_hashes


class TestDecodeFailure:
    async def test_a_dead_worker_ends_its_streams_within_seconds(self, start_router: StartRouter) -> None:
        """Nobody tells the router: it finds out by itself."""
        async with MockCluster(step_s=0.005) as cluster, start_router(cluster, transfer={"lease_s": 0.9}) as client:
            call = client.stream(request_of(max_tokens=400))
            await next_of(call)
            await cluster.decode[0].until(lambda: cluster.decode[0].acks)
            await cluster.decode[0].stop()
            error = await failure_of(call, timeout_s=5)
            assert (error.code(), error.details()) == (UNAVAILABLE, "decode-0 cannot be reached")

    async def test_membership_tells_at_once(self, start_router: StartRouter) -> None:
        async with MockCluster(step_s=0.005) as cluster, start_router(cluster, transfer={"lease_s": 60}) as client:
            call = client.stream(request_of(max_tokens=400))
            await next_of(call)
            decode = cluster.decode[0]
            await decode.until(lambda: decode.acks)
            await cluster.remove(decode)
            error = await failure_of(call, timeout_s=5)
            assert (error.code(), error.details()) == (UNAVAILABLE, "decode-0 is gone")
            await decode.stop()

    async def test_a_new_incarnation_ends_the_streams_of_the_old(self, start_router: StartRouter) -> None:
        async with MockCluster(step_s=0.005) as cluster, start_router(cluster, transfer={"lease_s": 60}) as client:
            call = client.stream(request_of(max_tokens=400))
            await next_of(call)
            old = cluster.decode[0]
            await old.until(lambda: old.acks)
            await cluster.add_decode("decode-0")
            await cluster.remove(old)
            assert (await failure_of(call, timeout_s=5)).code() == UNAVAILABLE
            assert len(tokens_of(await client.generate(request_of(max_tokens=3)))) == 3
            await old.stop()

    async def test_a_death_before_the_commit_costs_nothing(self, start_router: StartRouter) -> None:
        async with MockCluster(num_decode=2) as cluster, start_router(cluster) as client:
            await client.until_connected(3)
            first = cluster.decode[0]
            cluster.prefill[0].commit_gate.clear()
            call = client.stream(request_of(max_tokens=4))
            received = tokens_of([await next_of(call)])
            await cluster.remove(first)
            await client.until_connected(2)
            await first.stop()
            cluster.prefill[0].commit_gate.set()
            responses = await rest_of(call)
            assert received + tokens_of(responses) == [40, 41, 42, 43]
            assert responses[-1].timings.decode_worker == "decode-1"

    async def test_a_death_while_the_reservation_is_on_its_way(self, start_router: StartRouter) -> None:
        async with MockCluster(num_decode=2) as cluster, start_router(cluster) as client:
            await client.until_connected(3)
            first = cluster.decode[0]
            first.reserve_gate.clear()
            generated = asyncio.create_task(client.generate(request_of(max_tokens=4)))
            await first.until(lambda: first.reserves)
            await cluster.remove(first)
            assert len(tokens_of(await generated)) == 4
            await first.stop()

    async def test_a_failed_request_is_passed_on(self, start_router: StartRouter) -> None:
        async with MockCluster() as cluster, start_router(cluster) as client:
            decode = cluster.decode[0]
            decode.step_gate.clear()
            call = client.stream(request_of(max_tokens=4))
            await next_of(call)
            await decode.until(lambda: (0, 1) in decode.reservations)
            decode.fail((0, 1), "INTERNAL", "the engine broke")
            error = await failure_of(call)
            assert (error.code(), error.details()) == (grpc.StatusCode.INTERNAL, "the engine broke")

    async def test_a_lost_lease_is_a_new_attempt(self, start_router: StartRouter) -> None:
        async with MockCluster() as cluster, start_router(cluster, transfer={"lease_s": 0.3}) as client:
            decode = cluster.decode[0]
            decode.step_gate.clear()
            call = client.stream(request_of(max_tokens=4))
            received = tokens_of([await next_of(call)])
            decode.forgotten.add((0, 1))
            await decode.until(lambda: (0, 1) in decode.cancelled)
            decode.step_gate.set()
            responses = await rest_of(call)
            assert received + tokens_of(responses) == [40, 41, 42, 43]
            assert responses[-1].timings.attempts == 2


class TestReattach:
    async def test_no_token_is_lost_or_sent_twice(self, start_router: StartRouter) -> None:
        async with MockCluster(step_s=0.002) as cluster, start_router(cluster) as client:
            decode = cluster.decode[0]
            generated = [asyncio.create_task(client.generate(request_of(max_tokens=300, n=2))) for _ in range(4)]
            for _ in range(4):
                count = len(decode.hellos)
                await decode.until(lambda: decode.acks)
                decode.acks.clear()
                decode.break_attach()
                await decode.until(lambda count=count: len(decode.hellos) > count)  # type: ignore[misc]
            for responses in await asyncio.gather(*generated):
                for choice in range(2):
                    assert tokens_of(responses, choice) == [40 + (choice + position) % 20 for position in range(300)]

    async def test_tokens_made_while_detached_come_after_the_reattach(self, start_router: StartRouter) -> None:
        async with MockCluster() as cluster, start_router(cluster) as client:
            decode = cluster.decode[0]
            decode.step_gate.clear()
            call = client.stream(request_of(max_tokens=30))
            received = tokens_of([await next_of(call)])
            await decode.until(lambda: (0, 1) in decode.reservations and decode.reservations[0, 1].committed)
            decode.accepts_attach = False
            decode.break_attach()
            decode.step_gate.set()
            await decode.until(lambda: decode.reservations[0, 1].finished[0])
            decode.accepts_attach = True
            assert received + tokens_of(await rest_of(call)) == [40 + position % 20 for position in range(30)]
            assert decode.hellos[-1].epoch == decode.epoch

    async def test_a_cancel_while_detached_goes_by_call(self, start_router: StartRouter) -> None:
        async with MockCluster() as cluster, start_router(cluster) as client:
            decode = cluster.decode[0]
            decode.step_gate.clear()
            call = client.stream(request_of(max_tokens=30))
            await next_of(call)
            decode.accepts_attach = False
            num_hellos = len(decode.hellos)
            decode.break_attach()
            await decode.until(lambda: len(decode.hellos) > num_hellos)
            call.cancel()
            await decode.until(lambda: (0, 1) in decode.cancelled)
            decode.step_gate.set()
