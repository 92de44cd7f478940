"""Which node a worker goes to."""

from __future__ import annotations

from typing import Any

import pytest

from baton.config import CacheConfig, ModelConfig, ServeConfig, WorkerConfig
from deploy.placement import Node, Placed, Request, choose, describe_lack, fits, limit_memory, make_request

GPU = {"CPU": 8.0, "GPU": 2.0}


def config(joined: bool = True, **sections: Any) -> ServeConfig:
    cluster = {"ray_address": "auto" if joined else None, **sections.pop("cluster", {})}
    return ServeConfig.model_validate({"model": {"path": "m", **sections.pop("model", {})}, "cluster": cluster})


def node(name: str, resources: dict[str, float] | None = None, **labels: str) -> Node:
    return Node(name, f"10.0.0.{name}", {"CPU": 4.0} if resources is None else resources, labels)


def request(
    role: Any = "decode", *, pack: bool = False, labels: dict[str, str] | None = None, **amounts: float
) -> Request:
    return Request(role, amounts, labels or {}, pack)


@pytest.mark.parametrize(
    ("selector", "value", "fitting"),
    [
        ("decode", "decode", True),
        ("decode", "prefill", False),
        ("decode", None, False),
        ("!decode", "prefill", True),
        ("!decode", None, True),
        ("!decode", "decode", False),
        ("in(decode,both)", "both", True),
        ("in(decode, both)", "both", True),
        ("in(decode,both)", "prefill", False),
        ("!in(decode,both)", "prefill", True),
        ("!in(decode,both)", "both", False),
    ],
)
def test_a_label_selector_means_what_it_means_to_ray(selector: str, value: str | None, fitting: bool) -> None:
    there = node("1") if value is None else node("1", role=value)
    assert fits(there, request(labels={"role": selector}), []) is fitting


def test_workers_spread_over_nodes_and_take_the_emptiest() -> None:
    nodes = [node("1"), node("2"), node("3")]
    placed: list[Placed] = []
    for role in ("prefill", "prefill", "decode", "decode", "decode", "decode"):
        chosen = choose(nodes, request(role, CPU=1), placed)
        assert chosen is not None
        placed.append(Placed(chosen.id, request(role, CPU=1)))
    assert [place.node_id for place in placed] == ["1", "2", "3", "1", "2", "3"]


def test_workers_that_take_nothing_spread_too() -> None:
    nodes = [node("1"), node("2")]
    assert choose(nodes, request(), [Placed("1", request())]) == nodes[1]


def test_workers_pack_onto_one_node_until_it_is_full() -> None:
    nodes = [node("1"), node("2")]
    placed: list[Placed] = []
    for _ in range(5):
        chosen = choose(nodes, request(pack=True, CPU=1), placed)
        assert chosen is not None
        placed.append(Placed(chosen.id, request(CPU=1)))
    assert [place.node_id for place in placed] == ["1", "1", "1", "1", "2"]


def test_what_was_placed_is_taken() -> None:
    full = [Placed("1", request("prefill", GPU=1)), Placed("1", request("prefill", GPU=1))]
    assert choose([node("1", GPU)], request(GPU=1), full) is None
    assert choose([node("1", GPU)], request(GPU=1), full[:1]) is not None


@pytest.mark.parametrize(("joined", "expected"), [(True, {"CPU": 1.0}), (False, {})])
def test_a_worker_takes_a_cpu_of_a_cluster_that_was_joined(joined: bool, expected: dict[str, float]) -> None:
    assert make_request(config(joined), "prefill", [node("1")]).resources == expected


@pytest.mark.parametrize(
    ("joined", "device", "nodes", "gpus"),
    [
        (True, "auto", [node("1", GPU)], 1),
        (True, "auto", [node("1", GPU), node("2")], 0),
        (True, "auto", [], 0),
        (True, "cuda", [node("1", GPU), node("2")], 1),
        (True, "cpu", [node("1", GPU)], 0),
        (False, "auto", [node("1", {"CPU": 8.0, "GPU": 1.0})], 0.3333),
        (False, "auto", [node("1", {"CPU": 8.0, "GPU": 4.0})], 1),
    ],
)
def test_a_worker_takes_a_gpu_where_the_model_runs_on_one(
    joined: bool, device: str, nodes: list[Node], gpus: float
) -> None:
    made = make_request(config(joined, model={"device": device}, cluster={"decode_workers": 2}), "decode", nodes)
    assert made.resources.get("GPU", 0) == gpus


def test_a_worker_of_several_ranks_takes_a_gpu_and_a_cpu_for_each() -> None:
    ranks = {"prefill": {"tensor_parallel_size": 2}, "decode": {"tensor_parallel_size": 4}}
    settings = config(model={"device": "cuda"}).model_dump() | ranks
    made = make_request(ServeConfig.model_validate(settings), "decode", [node("1", GPU)])
    assert made.resources == {"CPU": 4, "GPU": 4}
    settings["cluster"]["decode_placement"] = {"num_gpus": 1}
    with pytest.raises(ValueError, match=r"decode_placement.num_gpus: 1 is not decode.tensor_parallel_size, 4"):
        ServeConfig.model_validate(settings)


def test_only_nodes_with_the_labels_count_for_the_gpus() -> None:
    nodes = [node("1", GPU, role="decode"), node("2", role="router")]
    made = make_request(config(cluster={"decode_placement": {"labels": {"role": "decode"}}}), "decode", nodes)
    assert made.resources["GPU"] == 1


def test_what_is_set_is_what_is_taken() -> None:
    placement = {"num_cpus": 4, "num_gpus": 0.5, "resources": {"fast-disk": 1}, "strategy": "pack"}
    made = make_request(config(cluster={"prefill_placement": placement}), "prefill", [])
    assert made.resources == {"CPU": 4, "GPU": 0.5, "fast-disk": 1}
    assert made.pack


@pytest.mark.parametrize(("gpus", "share"), [(0, 0.8), (0.25, 0.2), (1, 0.8), (2, 0.8)])
def test_a_share_of_a_gpu_is_one_of_its_memory(gpus: float, share: float) -> None:
    worker = WorkerConfig(
        role="decode",
        name="decode-0",
        epoch=1,
        model=ModelConfig(path="m"),
        cache=CacheConfig(gpu_memory_utilization=0.8),
    )
    limited = limit_memory(worker, request(GPU=gpus))
    assert limited.cache.gpu_memory_utilization == pytest.approx(share)


def test_a_lack_names_what_is_wanted_and_what_nodes_offer() -> None:
    nodes = [
        Node(
            "a", "10.0.0.1", {"CPU": 8, "node:10.0.0.1": 1, "memory": 1e9}, {"ray.io/node-id": "a", "role": "prefill"}
        ),
        Node("b", "10.0.0.2", {"CPU": 4, "GPU": 1, "fast-disk": 2}, {}),
    ]
    wanted = request(labels={"role": "decode"}, CPU=2, GPU=1)
    assert describe_lack(wanted, nodes, [Placed("b", wanted)]) == (
        "no node fits a decode worker (2 CPU, 1 GPU; role=decode); there are: "
        "10.0.0.1 (8 CPU, 0 GPU; role=prefill); 10.0.0.2 (4 CPU, 1 GPU, 2 fast-disk; no labels), 1 placed"
    )
    assert describe_lack(wanted, [], []).endswith("there are: none")


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ({"labels": {"role": "in()"}}, "labels"),
        ({"labels": {"role": "two words"}}, "labels"),
        ({"resources": {"GPU": 1}}, "GPU is no custom resource; there are num_cpus and num_gpus"),
        ({"resources": {"disk": 0}}, "resources"),
        ({"num_gpus": -1}, "num_gpus"),
        ({"gpus": 1}, "gpus"),
        ({"strategy": "scatter"}, "strategy"),
    ],
)
def test_a_placement_that_means_nothing_is_refused(placement: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(cluster={"decode_placement": placement})


def test_workers_cannot_publish_an_address_that_is_none() -> None:
    with pytest.raises(ValueError, match=r"0\.0\.0\.0|is no address"):
        config(cluster={"worker_host": "0.0.0.0"})
