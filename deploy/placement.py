"""Which node of a Ray cluster a worker goes to: pure functions of the nodes, of what is wanted and of what is there.

Ray places a worker by its resources and labels too, but spreads nothing that takes no resources, and says nothing of a
worker that no node will ever fit. So the node is chosen here where one fits, and left to Ray where none does yet.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence

from baton.config import Placement, Role, ServeConfig, WorkerConfig, num_ranks, with_part_of_gpu

# What `Placement.labels` may ask for, as in a label selector of Ray: a, !a, in(a,b) or !in(a,b).
_SELECTOR = re.compile(r"(?P<not>!?)(?:in\((?P<any>.*)\)|(?P<one>.*))")


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """A node that is alive: what it has in all, whoever uses it.

    Attributes:
        id: of Ray, in hex.
        address: its IP address.
    """

    id: str
    address: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]

    def offers(self) -> str:
        """In words, for who looks for a node that fits."""
        counted = [f"{self.resources.get(name, 0):g} {name}" for name in ("CPU", "GPU")]
        ours = {
            name: amount
            for name, amount in self.resources.items()
            if name not in ("CPU", "GPU", "memory", "object_store_memory") and not name.startswith("node:")
        }
        counted += [f"{amount:g} {name}" for name, amount in sorted(ours.items())]
        labels = _labels({name: value for name, value in self.labels.items() if not name.startswith("ray.io/")})
        return f"{self.address} ({', '.join(counted)}; {labels})"


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """What one worker of a role takes, with every default resolved.

    Attributes:
        resources: amounts by Ray's names, CPU and GPU among them; none is 0.
        labels: selectors by label.
    """

    role: Role
    resources: Mapping[str, float]
    labels: Mapping[str, str]
    pack: bool

    def __str__(self) -> str:
        amounts = [f"{amount:g} {name}" for name, amount in self.resources.items()]
        return f"{', '.join(amounts) or 'no resources'}; {_labels(self.labels)}"


@dataclasses.dataclass(frozen=True, slots=True)
class Placed:
    """A worker that is on a node, or on its way there."""

    node_id: str
    request: Request


def make_request(config: ServeConfig, role: Role, nodes: Sequence[Node]) -> Request:
    """What workers of `role` take.

    Where the number of CPUs is left open it is one for each rank in a cluster that was joined, so that no worker goes
    to a node without any, and none in a local Ray, which is for this alone. Where the number of GPUs is left open it is
    none for device cpu and, on auto, where not every node that fits has one; else it is one for each rank, or for a
    worker of one rank a share of one where the GPUs of a local Ray are fewer than its workers' ranks.
    """
    placement = placement_of(config, role)
    joined = config.cluster.ray_address is not None
    degree = (config.prefill if role == "prefill" else config.decode).tensor_parallel_size
    cpus = placement.num_cpus if placement.num_cpus is not None else float(joined * degree)
    amounts = {"CPU": cpus, **placement.resources}
    without_gpus = Request(role, _positive(amounts), placement.labels, pack=placement.strategy == "pack")
    gpus = placement.num_gpus
    if gpus is None:
        gpus = _num_gpus(config, degree, [node for node in nodes if fits(node, without_gpus, [])])
    resources = _positive({"CPU": cpus, "GPU": gpus, **placement.resources})
    return dataclasses.replace(without_gpus, resources=resources)


def limit_memory(config: WorkerConfig, request: Request) -> WorkerConfig:
    """The worker's config with its part of a GPU's memory, where it takes a share of one."""
    gpus = request.resources.get("GPU", 0.0)
    return with_part_of_gpu(config, gpus) if 0 < gpus < 1 else config


def placement_of(config: ServeConfig, role: Role) -> Placement:
    """The settings for workers of `role`."""
    return config.cluster.prefill_placement if role == "prefill" else config.cluster.decode_placement


def choose(nodes: Sequence[Node], request: Request, placed: Collection[Placed]) -> Node | None:
    """The node for one more worker; None where none has room for it.

    To spread is to take the node with the fewest workers of this role, then with the fewest of all; to pack, the one
    with the most.
    """
    candidates = [node for node in nodes if fits(node, request, placed)]
    sign = -1 if request.pack else 1

    def order(node: Node) -> tuple[int, int, str]:
        here = [other.request.role for other in placed if other.node_id == node.id]
        return sign * here.count(request.role), sign * len(here), node.address

    return min(candidates, key=order, default=None)


def fits(node: Node, request: Request, placed: Collection[Placed]) -> bool:
    """Whether a node has the labels, and beside the workers that were placed there the resources."""
    if not all(_matches(selector, node.labels.get(name)) for name, selector in request.labels.items()):
        return False
    here = [other.request.resources for other in placed if other.node_id == node.id]
    return all(
        node.resources.get(name, 0) - sum(taken.get(name, 0) for taken in here) >= amount - 1e-9
        for name, amount in request.resources.items()
    )


def describe_lack(request: Request, nodes: Sequence[Node], placed: Collection[Placed]) -> str:
    """Why no node has room for one more worker: what is wanted, and what each node offers."""
    offers = [
        node.offers() + (f", {count} placed" if (count := sum(p.node_id == node.id for p in placed)) else "")
        for node in nodes
    ]
    return f"no node fits a {request.role} worker ({request}); there are: {'; '.join(offers) or 'none'}"


def _num_gpus(config: ServeConfig, degree: int, fitting: Sequence[Node]) -> float:
    if config.model.device == "cpu":
        return 0.0
    total = sum(node.resources.get("GPU", 0.0) for node in fitting)
    if config.model.device == "auto" and not (fitting and all(node.resources.get("GPU") for node in fitting)):
        return 0.0
    if degree == 1 and config.cluster.ray_address is None and 0 < total < (ranks := num_ranks(config)):
        # Ray keeps shares of a GPU to four places.
        return math.floor(total / ranks * 10_000) / 10_000
    return float(degree)


def _positive(amounts: Mapping[str, float]) -> dict[str, float]:
    return {name: amount for name, amount in amounts.items() if amount > 0}


def _matches(selector: str, value: str | None) -> bool:
    parsed = _SELECTOR.fullmatch(selector)
    assert parsed is not None
    values = [parsed["one"]] if parsed["any"] is None else [item.strip() for item in parsed["any"].split(",")]
    return (value in values) != bool(parsed["not"])


def _labels(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(labels.items())) or "no labels"
