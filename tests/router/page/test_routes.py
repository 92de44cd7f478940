from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from bench.mock_workers.cluster import MockCluster
from router.page import routes
from tests.router.conftest import Client, StartRouter, next_of, request_of, rest_of, text_of

STATIC = sorted(routes._FOLDER.iterdir())
PROMPT = "hello world, the quick brown fox"
STAGES = ["queue", "reserve", "prefill", "transfer", "first_decode_step", "decode"]


def browser(client: Client) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://{client.server.http_address}")


async def snapshot_of(client: Client, condition: Any = lambda snapshot: True) -> dict[str, Any]:
    """The first snapshot that meets the condition; the stream brings one whenever something has changed."""
    async with browser(client) as http, http.stream("GET", "/live", timeout=10) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        async for snapshot in frames(response):
            if condition(snapshot):
                return snapshot
    raise AssertionError("the stream ended")


async def frames(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


class TestFiles:
    async def test_the_page_and_all_that_it_names_are_served(self, start_router: StartRouter) -> None:
        async with MockCluster() as cluster, start_router(cluster) as client, browser(client) as http:
            page = await http.get("/")
            assert page.headers["content-type"] == "text/html; charset=utf-8"
            policy = page.headers["content-security-policy"]
            assert policy.startswith("default-src 'self'; ")
            assert "unsafe" not in policy
            names = {f"/page/{path.name}" for path in STATIC if path.suffix in (".js", ".css", ".svg")}
            texts = [page.text]
            for name in names:
                response = await http.get(name)
                assert response.status_code == 200
                texts.append(response.text)
            named = {path for text in texts for path in re.findall(r'"(/page/[^"]+)"', text)}
            imported = {f"/page/{name}" for text in texts for name in re.findall(r'from "\./([^"]+)"', text)}
            assert named | imported == names

    async def test_a_file_that_the_browser_has_is_not_sent_again(self, start_router: StartRouter) -> None:
        async with MockCluster() as cluster, start_router(cluster) as client, browser(client) as http:
            first = await http.get("/page/app.js")
            again = await http.get("/page/app.js", headers={"If-None-Match": first.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
            assert again.headers["etag"] == first.headers["etag"]
            assert (await http.get("/page/app.js", headers={"If-None-Match": '"older"'})).status_code == 200

    def test_it_is_small_and_needs_nobody_else(self) -> None:
        assert sum(path.stat().st_size for path in STATIC) < 60_000
        texts = [path.read_text() for path in STATIC]
        addresses = {address for text in texts for address in re.findall(r"https?://[^\s\"']+", text)}
        assert addresses == {"http://www.w3.org/2000/svg"}


class TestLive:
    async def test_the_snapshot_shows_workers_and_the_stages_of_a_request(self, start_router: StartRouter) -> None:
        async with MockCluster() as cluster, start_router(cluster) as client:
            cluster.prefill[0].cached_tokens = 3
            cluster.prefill[0].publish(stored=[bytes(36)], free_blocks=60)
            responses = await client.generate(request_of(PROMPT, request_id="mine", max_tokens=5))
            snapshot = await snapshot_of(client, lambda snapshot: snapshot["workers"][0]["blocks"]["used"])
            assert snapshot["router"]["model"] == "mock"
            assert snapshot["router"]["ready"] is True
            prefill, decode = snapshot["workers"]
            assert (prefill["name"], prefill["role"], prefill["state"]) == ("prefill-0", "prefill", "up")
            assert prefill["blocks"] == {"total": 64, "used": 4, "cached": 0}
            assert (decode["name"], decode["epoch"]) == ("decode-0", 2)
            (request,) = snapshot["requests"]
            usage = responses[-1].usage
            assert (request["id"], request["outcome"]) == ("mine", "length")
            assert (request["prompt_tokens"], request["cached_tokens"]) == (usage.prompt_tokens, 3)
            assert request["generated_tokens"] == 5
            (leg,) = request["legs"]
            assert (leg["prefill"], leg["decode"], leg["failure"]) == ("prefill-0", "decode-0", "")
            # The durations that mock workers report are longer than the request.
            stages = [span[0] for span in leg["spans"]]
            assert len(stages) > STAGES.index("transfer")
            assert stages == STAGES[: len(stages)]
            last = leg["spans"][-1]
            assert last[1] + last[2] == pytest.approx(request["ended"], abs=1e-5)
            assert snapshot["flow"]["last_transfer"] is None or snapshot["flow"]["last_transfer"]["transport"] == "mock"
            assert snapshot["flow"]["ttft"]["p50_s"] > 0

    async def test_neither_prompts_nor_answers_are_shown(self, start_router: StartRouter) -> None:
        async with MockCluster() as cluster, start_router(cluster) as client, browser(client) as http:
            cluster.decode[0].step_gate.clear()
            call = client.stream(request_of(PROMPT, max_tokens=5))
            text = text_of([await next_of(call)])
            running = json.dumps(await snapshot_of(client, lambda snapshot: snapshot["flow"]["stages"]))
            cluster.decode[0].step_gate.set()
            text += text_of(await rest_of(call))
            ended = (await http.get("/live/snapshot")).text
            for shown in (running, ended):
                assert PROMPT not in shown
                assert text not in shown
                assert "token_ids" not in shown

    async def test_the_stream_brings_what_changes(self, start_router: StartRouter) -> None:
        async with MockCluster() as cluster, start_router(cluster) as client:
            async with browser(client) as http, http.stream("GET", "/live", timeout=10) as response:
                live = frames(response)
                assert (await anext(live))["requests"] == []
                await client.generate(request_of(max_tokens=2))
                async for frame in live:
                    if frame["requests"] and frame["requests"][0]["ended"] is not None:
                        break
            assert (await snapshot_of(client))["requests"][0]["generated_tokens"] == 2

    async def test_a_worker_that_died_is_shown_as_gone_beside_its_replacement(self, start_router: StartRouter) -> None:
        async with MockCluster() as cluster, start_router(cluster) as client:
            await cluster.decode[0].stop()
            await cluster.remove(cluster.decode[0])
            await cluster.add_decode("decode-0")
            await cluster.publish()
            snapshot = await snapshot_of(client, lambda snapshot: snapshot["router"]["ready"])
            assert [(worker["name"], worker["epoch"], worker["state"]) for worker in snapshot["workers"]] == [
                ("prefill-0", 1, "up"),
                ("decode-0", 3, "up"),
                ("decode-0", 2, "gone"),
            ]

    async def test_a_stopping_router_ends_the_streams_of_those_who_look(self, start_router: StartRouter) -> None:
        async with (
            MockCluster() as cluster,
            start_router(cluster) as client,
            browser(client) as http,
            http.stream("GET", "/live", timeout=10) as response,
        ):
            live = frames(response)
            await anext(live)
            client.server._page.close()
            assert [frame async for frame in live] == []
