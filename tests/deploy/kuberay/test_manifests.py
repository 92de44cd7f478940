"""The manifests are what Kubernetes, KubeRay and the Prometheus operator take, and what Baton needs of them."""

from __future__ import annotations

import copy
import functools
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from baton.config import ServeConfig
from deploy import kuberay, settings
from deploy.kuberay.arguments import Arguments
from deploy.placement import Node, Placed, choose, make_request
from deploy.runtimes.base import STOP_GRACE_S
from deploy.supervisor import worker_names

FOLDER = pathlib.Path(kuberay.__path__[0])
FILES = sorted(FOLDER.glob("*.yaml"))
CLUSTERS = ["cluster-cpu.yaml", "cluster-gpu.yaml", "service-cpu.yaml", "service-gpu.yaml"]
SCHEMAS = yaml.safe_load((pathlib.Path(__file__).parent / "crd_schemas.yaml").read_text())
KUBERNETES = "1.34"
IMAGES = {"baton:cpu", "baton:cuda"}
# What the router's pod takes to join Ray and to load the tokenizer, at most.
JOINING_S = 60.0


@functools.cache
def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def document(name: str, kind: str) -> Any:
    return next(document for document in documents(name) if document["kind"] == kind)


def ray_cluster(name: str) -> Any:
    """The spec of the RayCluster in a file, whoever makes it."""
    spec = documents(name)[0]["spec"]
    return spec.get("rayClusterConfig", spec)


def groups(name: str) -> list[Any]:
    cluster = ray_cluster(name)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def templates(name: str) -> Iterator[Any]:
    """Every pod template of a file."""
    for found in documents(name):
        if found["kind"] == "Deployment":
            yield found["spec"]["template"]
        elif found["kind"] in ("RayCluster", "RayService"):
            yield from (group["template"] for group in groups(name))


def serve_config(name: str) -> ServeConfig:
    """What `baton serve` makes of the file that a manifest mounts."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(document(name, "ConfigMap")["data"]["baton.yaml"])
        file.flush()
        return settings.load(file.name, {}, {})


def component(template: Any) -> str:
    return str(template["metadata"]["labels"]["app.kubernetes.io/component"])


def all_templates() -> list[Any]:
    return [template for file in FILES for template in templates(file.name)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_document_is_valid(file: pathlib.Path) -> None:
    for found in documents(file.name):
        schema = SCHEMAS.get(f"{found['apiVersion']}/{found['kind']}")
        if schema is None:
            kubernetes_validate.validate(found, KUBERNETES, strict=True)
        else:
            jsonschema.Draft202012Validator({**schema, "$defs": SCHEMAS["$defs"]}).validate(found)
    for template in templates(file.name):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", **template.get("metadata", {})}}
        kubernetes_validate.validate({**pod, "spec": template["spec"]}, KUBERNETES, strict=True)


def test_a_misspelt_field_would_not_pass() -> None:
    cluster = copy.deepcopy(document("cluster-cpu.yaml", "RayCluster"))
    cluster["spec"]["workerGroupSpecs"][0]["lables"] = {}
    schema = {**SCHEMAS["ray.io/v1/RayCluster"], "$defs": SCHEMAS["$defs"]}
    with pytest.raises(jsonschema.ValidationError, match="lables"):
        jsonschema.Draft202012Validator(schema).validate(cluster)


@pytest.mark.parametrize("template", all_templates(), ids=component)
def test_no_pod_runs_as_root_or_gains_rights(template: Any) -> None:
    spec = template["spec"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        assert container["image"] in IMAGES
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
        assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_kuberay_makes_the_token_and_gives_it_to_its_pods(name: str) -> None:
    """It uses the token itself only where the cluster's own field asks for one."""
    assert ray_cluster(name)["authOptions"] == {"mode": "token"}
    for template in templates(name):
        for container in template["spec"]["containers"]:
            assert not [each for each in container.get("env", []) if each["name"].startswith("RAY_AUTH_")]


def test_the_router_has_the_token_that_kuberay_makes() -> None:
    spec = document("baton.yaml", "Deployment")["spec"]["template"]["spec"]
    clusters = {document(name, "RayCluster")["metadata"]["name"] for name in CLUSTERS if name.startswith("cluster")}
    for container in [*spec["containers"], *spec["initContainers"]]:
        variables = {variable["name"]: variable for variable in container["env"]}
        assert variables["RAY_AUTH_MODE"]["value"] == "token"
        secret = variables["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
        assert ({secret["name"]}, secret["key"]) == (clusters, "auth_token")


@pytest.mark.parametrize("template", all_templates(), ids=component)
def test_every_pod_has_shared_memory_and_reads_models_only(template: Any) -> None:
    spec = template["spec"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    (container,) = spec["containers"]
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"]["medium"] == "Memory"
    if template["metadata"]["labels"]["app.kubernetes.io/component"] != "head":
        assert mounts["/models"]["readOnly"]
        assert volumes["models"]["persistentVolumeClaim"]["readOnly"]


def test_the_router_is_probed_and_has_time_to_drain() -> None:
    spec = document("baton.yaml", "Deployment")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"
    startup = container["startupProbe"]
    allowed_s = startup["periodSeconds"] * startup["failureThreshold"]
    waits_s = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    for name in ("cluster-cpu.yaml", "cluster-gpu.yaml"):
        # Router and workers are each given a moment more than the drain.
        cluster = serve_config(name).cluster
        assert spec["terminationGracePeriodSeconds"] > waits_s + cluster.drain_s + 2 * STOP_GRACE_S
        assert allowed_s > cluster.node_wait_s + JOINING_S


@pytest.mark.parametrize("name", ["service-cpu.yaml", "service-gpu.yaml"])
def test_a_ray_service_gives_its_replica_time_to_drain(name: str) -> None:
    (application,) = yaml.safe_load(document(name, "RayService")["spec"]["serveConfigV2"])["applications"]
    arguments = Arguments.model_validate(application["args"])
    assert application["import_path"] == "deploy.kuberay.serve_app:app"
    assert arguments.drain_s > serve_config(name).cluster.drain_s + 2 * STOP_GRACE_S
    router = next(group for group in groups(name) if group.get("groupName") == "router")
    assert application["deployments"][0]["ray_actor_options"]["label_selector"] == router["labels"]
    spec = router["template"]["spec"]
    waits_s = float(spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert spec["terminationGracePeriodSeconds"] > waits_s + arguments.drain_s


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_cluster_has_room_for_every_worker_where_it_may_go(name: str) -> None:
    config = serve_config(name)
    nodes = [
        Node(f"{group['groupName']}-{index}", f"10.0.0.{index}", _offers(group), group["labels"])
        for group in ray_cluster(name)["workerGroupSpecs"]
        for index in range(group["replicas"])
    ]
    placed: list[Placed] = []
    for role, name in worker_names(config):
        request = make_request(config, role, nodes)
        node = choose(nodes, request, placed)
        assert node is not None, f"no room for {name}"
        assert node.labels["baton-role"] == role
        placed.append(Placed(node.id, request))
    assert len({place.node_id for place in placed}) == len(placed)


def test_a_ray_service_has_the_workers_of_the_ray_cluster() -> None:
    for kind in ("cpu", "gpu"):
        workers = [group for group in groups(f"service-{kind}.yaml") if group.get("groupName") != "router"]
        head, *others = groups(f"cluster-{kind}.yaml")
        assert workers[1:] == others
        ports = workers[0]["template"]["spec"]["containers"][0]["ports"]
        assert ports[:-1] == head["template"]["spec"]["containers"][0]["ports"]


@pytest.mark.parametrize("name", ["service-cpu.yaml", "service-gpu.yaml"])
def test_clients_of_a_ray_service_reach_the_routers_pod_alone(name: str) -> None:
    assert document(name, "RayService")["spec"]["excludeHeadPodFromServeSvc"] is True
    head, router, *workers = groups(name)
    # Without this port KubeRay makes no service for Serve.
    assert {"name": "serve", "containerPort": 8000} in head["template"]["spec"]["containers"][0]["ports"]
    # KubeRay's own readiness probe keeps pods without Serve's proxy out of that service, which selects all workers.
    for group in (router, *workers):
        assert "readinessProbe" not in group["template"]["spec"]["containers"][0]


def test_services_and_policies_select_pods_that_exist() -> None:
    labels = [template["metadata"]["labels"] for template in all_templates()]
    for name in ("baton.yaml", "network-policy.yaml", "service-cpu.yaml", "service-gpu.yaml"):
        for found in documents(name):
            selector = {
                "Service": lambda spec: spec["selector"],
                "PodDisruptionBudget": lambda spec: spec["selector"]["matchLabels"],
                "NetworkPolicy": lambda spec: spec["podSelector"]["matchLabels"],
            }.get(found["kind"])
            if selector is not None:
                wanted = selector(found["spec"]).items()
                assert any(wanted <= pod.items() for pod in labels), found["metadata"]["name"]


def _offers(group: Any) -> dict[str, float]:
    """What Ray takes a pod's node to have: KubeRay reads it from the limits, unless the parameters say otherwise."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    parameters = group["rayStartParams"]
    cpus = parameters.get("num-cpus", limits.get("cpu", 0))
    gpus = parameters.get("num-gpus", limits.get("nvidia.com/gpu", 0))
    return {"CPU": float(cpus), "GPU": float(gpus)}
