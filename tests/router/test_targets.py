from __future__ import annotations

import dataclasses

import httpx
import pytest

from bench.mock_workers.cluster import MockCluster
from router.snapshot import ClusterSnapshot, WorkerKey, WorkerView
from router.targets import router_target, target_groups
from tests.router.conftest import Client, StartRouter


def view(role: str, name: str, metrics_address: str) -> WorkerView:
    return WorkerView(key=WorkerKey(name, 7), role=role, metrics_address=metrics_address, pid=42)


def test_every_worker_and_the_router_are_a_group_of_their_own() -> None:
    snapshot = ClusterSnapshot(
        prefill=(view("prefill", "prefill-0", "10.0.0.2:9000"),), decode=(view("decode", "decode-0", "10.0.0.3:9000"),)
    )
    groups = target_groups(snapshot, router="10.0.0.1:8000", scheme="https", model="llama")
    assert [group["targets"] for group in groups] == [["10.0.0.1:8000"], ["10.0.0.2:9000"], ["10.0.0.3:9000"]]
    assert groups[0]["labels"] == {"role": "router", "worker": "router", "model": "llama", "__scheme__": "https"}
    assert groups[2]["labels"] == {
        "role": "decode",
        "worker": "decode-0",
        "model": "llama",
        "__scheme__": "http",
        "__meta_baton_epoch": "7",
        "__meta_baton_pid": "42",
    }


def test_ranks_of_a_worker_are_named_after_it() -> None:
    first = dataclasses.replace(
        view("decode", "decode-0", "10.0.0.3:9000"), rank_metrics_addresses=("10.0.0.3:9001", "10.0.0.3:9002")
    )
    groups = target_groups(ClusterSnapshot(decode=(first,)), router="r:1", scheme="http", model="m")
    assert {group["labels"]["worker"]: group["targets"] for group in groups[1:]} == {
        "decode-0": ["10.0.0.3:9000"],
        "decode-0/1": ["10.0.0.3:9001"],
        "decode-0/2": ["10.0.0.3:9002"],
    }


def test_a_worker_without_metrics_is_left_out() -> None:
    groups = target_groups(ClusterSnapshot(decode=(view("decode", "d", ""),)), router="r:1", scheme="http", model="m")
    assert [group["labels"]["role"] for group in groups] == ["router"]


@pytest.mark.parametrize(
    ("listens_on", "asked_as", "scheme", "target"),
    [
        ("10.0.0.1:8000", "baton.example.org", "http", "10.0.0.1:8000"),
        ("baton-0.local:8000", "elsewhere:1", "http", "baton-0.local:8000"),
        ("0.0.0.0:8000", "10.0.0.9:8000", "http", "10.0.0.9:8000"),
        (":::8000", "[fd00::9]:8000", "http", "[fd00::9]:8000"),
        (":8000", "baton:8000", "http", "baton:8000"),
        ("127.0.0.1:8000", "localhost:18000", "http", "localhost:18000"),
        ("0.0.0.0:8000", "baton.example.org", "http", "baton.example.org:80"),
        ("0.0.0.0:8000", "baton.example.org", "https", "baton.example.org:443"),
        ("0.0.0.0:8000", None, "http", "0.0.0.0:8000"),
        ("0.0.0.0:8000", 'evil"host:1', "http", "0.0.0.0:8000"),
        (":8000", None, "http", "localhost:8000"),
    ],
)
def test_the_router_names_an_address_that_the_asker_can_reach(
    listens_on: str, asked_as: str | None, scheme: str, target: str
) -> None:
    assert router_target(listens_on, asked_as, scheme) == target


async def test_workers_come_and_go(start_router: StartRouter) -> None:
    async with MockCluster() as cluster, start_router(cluster) as client:
        assert await targets(client) == {"router": client.server.http_address, **addresses(cluster)}
        await cluster.add_decode("decode-9")
        await cluster.publish()
        await client.until_connected(3)
        assert await targets(client) == {"router": client.server.http_address, **addresses(cluster)}
        await cluster.remove(cluster.decode[0])
        await client.until_status(lambda status: len(status.workers) == 2)
        assert set(await targets(client)) == {"router", "prefill-0", "decode-9"}


async def targets(client: Client) -> dict[str, str]:
    """What Prometheus would scrape: the address of each worker."""
    async with httpx.AsyncClient(base_url=f"http://{client.server.http_address}") as http:
        answer = await http.get("/targets")
    assert answer.headers["content-type"] == "application/json"
    return {group["labels"]["worker"]: group["targets"][0] for group in answer.json()}


def addresses(cluster: MockCluster) -> dict[str, str]:
    return {worker.info().name: worker.info().metrics_address for worker in (*cluster.prefill, *cluster.decode)}
