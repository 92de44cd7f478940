"""A cluster of several hosts, as deploy/ray/launch.sh starts it; each has an address, a shared memory, processes."""

from __future__ import annotations

import pathlib
import signal
import sys
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from baton.client import Client, WorkerStatus
from deploy.local_cluster import LocalCluster
from tests.cluster.hosts import Host, Network, signal_command
from tests.cluster.oracle import Oracle, prompt_of
from tests.engine.checkpoints import make_checkpoint

pytestmark = pytest.mark.clusters

LAUNCH = str(pathlib.Path(__file__).parents[2] / "deploy" / "ray" / "launch.sh")
ENVIRONMENT = {
    # The commands of this environment, `ray` and `baton`, as on a host where it is activated.
    "PATH": f"{pathlib.Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
    "RAY_AUTH_TOKEN": "b" * 64,
    "OMP_NUM_THREADS": "1",
    # A host that is gone is missed after two seconds rather than fifteen.
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "500",
    "RAY_health_check_failure_threshold": "3",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """Two hosts: the router's, which has room for prefill as well, and one for decode."""
    with Network("prefill", "decode") as network:
        head = network["prefill"]
        head.run(LAUNCH, "head", "--labels=baton-role=prefill", *node_options(head), **environment(head))
        join(network, network["decode"])
        yield network


@pytest.fixture(scope="module")
def cluster(network: Network, model: pathlib.Path) -> Iterator[LocalCluster]:
    host = network["prefill"]
    cluster = LocalCluster(
        model,
        *("--host", host.address),
        command=host.command(LAUNCH, "serve"),
        environment={**host.environment(), **environment(host)},
    )
    cluster.start()
    try:
        cluster.wait_ready()
        yield cluster
        signal_command(cluster.process, signal.SIGTERM)
        assert cluster.process.wait() == 0
    finally:
        cluster.close()


def environment(host: Host) -> dict[str, str]:
    return {**ENVIRONMENT, "NODE_IP": host.address}


def node_options(host: Host) -> list[str]:
    """Room for one worker; and what the hosts of one machine would get in each other's way with."""
    return ["--num-cpus=1", "--include-log-monitor=false", f"--temp-dir={host.folder}"]


def join(network: Network, host: Host) -> None:
    """Makes `host` a node for workers of the role that it is named after."""
    head = network["prefill"].address
    host.run(LAUNCH, "join", head, host.name, *node_options(host), **environment(host))


def received_bytes(worker: WorkerStatus) -> dict[str, float]:
    """KV bytes that a worker has received, by transport."""
    with urllib.request.urlopen(f"http://{worker.metrics_address}/metrics") as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {
            sample.labels["transport"]: sample.value
            for family in families
            for sample in family.samples
            if sample.name == "baton_kv_received_bytes_total"
        }


def worker_of(client: Client, role: str) -> WorkerStatus:
    (worker,) = (worker for worker in client.status().workers if worker.role == role)
    return worker


@pytest.mark.timeout(120)
def test_prefill_and_decode_run_on_the_hosts_that_were_labelled_for_them(
    network: Network, cluster: LocalCluster
) -> None:
    with Client(cluster.target) as client:
        for role in ("prefill", "decode"):
            assert worker_of(client, role).address.startswith(f"{network[role].address}:")


def test_kv_goes_from_host_to_host_over_grpc(cluster: LocalCluster, model: pathlib.Path) -> None:
    oracle = Oracle(model)
    with Client(cluster.target) as client:
        for length in (40, 200, 700):
            completion = client.generate(prompt_of(length), max_tokens=12, temperature=0.0)
            assert list(completion.choices[0].token_ids) == oracle.generate(prompt_of(length), 12)
            assert not completion.timings.local_prefill
        received = received_bytes(worker_of(client, "decode"))
    assert received["grpc"] > 0
    assert received["shm"] == received["loopback"] == 0


def test_requests_wait_for_a_worker_that_was_killed_to_be_replaced(
    network: Network, cluster: LocalCluster, model: pathlib.Path
) -> None:
    with Client(cluster.target) as client:
        victim = worker_of(client, "decode")
        network["decode"].run("kill", "-KILL", str(victim.pid))
        completion = client.generate(prompt_of(300), max_tokens=12, temperature=0.0)
        assert list(completion.choices[0].token_ids) == Oracle(model).generate(prompt_of(300), 12)
        replacement = worker_of(client, "decode")
    assert replacement.epoch > victim.epoch
    assert replacement.address.startswith(f"{network['decode'].address}:")


def test_a_worker_comes_back_when_a_host_takes_the_place_of_one_that_is_gone(
    network: Network, cluster: LocalCluster
) -> None:
    with Client(cluster.target) as client:
        victim = worker_of(client, "decode")
        network["decode"].stop()
        host = network.add("decode")
        join(network, host)
        completion = client.generate(prompt_of(150), max_tokens=2, ignore_eos=True)
        replacement = worker_of(client, "decode")
    assert completion.usage.completion_tokens == 2
    assert replacement.epoch > victim.epoch
    assert replacement.address.startswith(f"{host.address}:")
