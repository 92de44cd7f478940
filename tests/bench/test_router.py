from __future__ import annotations

import asyncio
import json

import click.testing
import pytest

from bench.router import command
from bench.router.bare_server import Ticker
from bench.router.clients import SseClient
from bench.router.command import Load
from bench.router.measurements import Latencies, Prompts, Serving, Streaming
from bench.router.results import Measured

LOAD = Load(
    num_streams=3,
    num_tokens=60,
    step_ms=2.0,
    rounds=1,
    num_latencies=2,
    num_requests=20,
    tokens_per_request=3,
)


@pytest.fixture(scope="module")
def measured() -> Measured:
    """Of real processes."""
    return command.measure(LOAD)


def test_every_protocol_is_measured_and_no_stream_lacks_a_token(measured: Measured) -> None:
    assert list(measured.ttft) == ["direct", "grpc", "sse"]
    assert list(measured.streaming) == ["bare", "grpc", "sse"]
    assert list(measured.saturated) == ["grpc", "sse"]
    assert all(rounds[0].cpu_us_per_token > 0 for rounds in measured.streaming.values())
    assert measured.streaming["bare"][0].messages_per_token == 1
    # An event for each token, also where several come together.
    assert measured.streaming["sse"][0].messages_per_token == 1
    assert 0 < measured.streaming["grpc"][0].messages_per_token <= 1


def test_a_long_run_is_told_in_ten_points(measured: Measured) -> None:
    assert [point.num_requests for point in measured.points] == [2] * 10
    assert all(point.rss_bytes > 0 and point.cpu_ms_per_request > 0 for point in measured.points)


def test_results_are_plain_json(measured: Measured) -> None:
    told = json.loads(json.dumps(measured.to_json(), allow_nan=False))
    assert told["grpc_over_bare"] == measured.cpu_us_per_token("grpc") / measured.cpu_us_per_token("bare")
    assert set(told["added_ttft_ms"]) == {"grpc", "sse"}
    assert [len(table.rows) for table in measured.tables()] == [3, 3, 12]


def test_each_aim_is_judged() -> None:
    def of(direct_ms: float, router_ms: float, bare_us: float, grpc_us: float, sse_us: float) -> list[str]:
        point = Serving(1, 1.0, 1.0, 1.0, 1.0, 1.0, 1)
        measured = Measured(
            {name: Latencies(ms, ms) for name, ms in (("direct", direct_ms), ("grpc", router_ms), ("sse", router_ms))},
            {name: [Streaming(us, 1.0, 0.5)] for name, us in (("bare", bare_us), ("grpc", grpc_us), ("sse", sse_us))},
            {"grpc": point, "sse": point},
            [point],
        )
        ttft, streaming, _ = measured.tables()
        return [row[-1] for row in (*ttft.rows[1:], *streaming.rows[1:])]

    assert of(1.0, 3.0, 50.0, 65.0, 60.0) == ["pass"] * 4
    assert of(1.0, 3.1, 50.0, 65.1, 60.1) == ["miss"] * 4


def test_streams_that_end_before_the_last_begins_are_told() -> None:
    result = click.testing.CliRunner().invoke(command.command, ["--tokens", "19"])
    assert result.exit_code == 2
    assert "--tokens" in result.output


def test_prompts_differ() -> None:
    prompts = iter(Prompts(num_words=8))
    texts = [next(prompts) for _ in range(50)]
    assert len(set(texts)) == 50
    assert all(len(text.split()) == 8 for text in texts)


async def test_all_who_wait_are_woken_by_one_tick() -> None:
    ticker = Ticker(0.001)
    await asyncio.gather(*(ticker.wait() for _ in range(5)))
    await ticker.wait()


@pytest.mark.parametrize("cut", [1, 3, 7, 1 << 10])
async def test_events_are_counted_however_the_stream_is_cut(cut: int) -> None:
    events = [b'data: {"choices": []}\n\n'] * 5 + [b"data: [DONE]\n\n"]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in events)
    answer = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().split(b"content-length:")[1].split()[0]))
            for start in range(0, len(answer), cut):
                writer.write(answer[start : start + cut])
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        client = SseClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        for _ in range(2):
            seen: list[int] = []
            await client.stream("hello", 5, lambda seen=seen: seen.append(1))  # type: ignore[misc]
            assert len(seen) == 5
        await client.close()
