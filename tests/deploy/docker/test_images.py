"""The Dockerfiles and the compose file, checked without a Docker engine; and the wheel that goes into the images."""

from __future__ import annotations

import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from typing import Any

import jsonschema
import pytest
import yaml

from baton.config import ServeConfig
from deploy import settings
from deploy.docker import health
from deploy.runtimes.base import STOP_GRACE_S
from deploy.settings import schema
from tests.deploy.docker.instructions import Instruction, parse

REPOSITORY = pathlib.Path(__file__).parents[3]
FOLDER = REPOSITORY / "deploy" / "docker"
DOCKERFILES = sorted(FOLDER.glob("Dockerfile*"))
PACKAGES = ["baton", "engine", "kvtransfer", "worker", "prefill_worker", "decode_worker", "router", "bench", "deploy"]
IMAGE_FILE = FOLDER / "image.yaml"
COMPOSE_SCHEMA = yaml.safe_load((pathlib.Path(__file__).parent / "compose_schema.yaml").read_text())
SECONDS = re.compile(r"(\d+)s")

dockerfile = pytest.fixture(params=DOCKERFILES, ids=lambda path: path.name)(lambda request: parse(request.param))


def of_kind(instructions: list[Instruction], name: str) -> list[Instruction]:
    return [instruction for instruction in instructions if instruction.name == name]


def environment(instructions: list[Instruction]) -> dict[str, str]:
    """What the last stage sets."""
    words = [word for instruction in of_kind(instructions, "ENV") for word in shlex.split(instruction.arguments)]
    return dict(word.split("=", 1) for word in words)


def test_images_are_made_in_two_stages_of_pinned_images(dockerfile: list[Instruction]) -> None:
    stages = of_kind(dockerfile, "FROM")
    assert [stage.arguments for stage in stages] == ["${PYTHON_IMAGE} AS build", "${PYTHON_IMAGE}"]
    image = of_kind(dockerfile, "ARG")[0].arguments
    assert re.fullmatch(r"PYTHON_IMAGE=python:\d+\.\d+\.\d+-slim-\w+", image)


def test_everything_that_is_copied_exists_and_is_sent_to_the_engine(dockerfile: list[Instruction]) -> None:
    ignored = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line[:1] not in ("", "#")]
    assert ignored[0] == "*"
    for instruction in of_kind(dockerfile, "COPY"):
        *sources, _ = [word for word in shlex.split(instruction.arguments) if not word.startswith("--")]
        for source in sources:
            local = source.removeprefix("/src/")
            assert (REPOSITORY / local).exists(), source
            top = local.partition("/")[0]
            assert f"!{top}" in ignored, f".dockerignore keeps {top} away"


def test_all_packages_are_copied(dockerfile: list[Instruction]) -> None:
    copied = {shlex.split(instruction.arguments)[0] for instruction in of_kind(dockerfile, "COPY")}
    assert copied >= set(PACKAGES)


def test_dependencies_are_those_of_constraints_txt(dockerfile: list[Instruction]) -> None:
    pip = [run.arguments for run in of_kind(dockerfile, "RUN") if "pip " in run.arguments]
    assert sum("-c constraints.txt" in command for command in pip) == 1
    assert "--no-index --find-links /wheels" in pip[-1]
    assert re.search(r"^torch==", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)


def test_nothing_runs_as_root(dockerfile: list[Instruction]) -> None:
    assert of_kind(dockerfile, "USER")[-1].arguments == "1000:1000"
    after = dockerfile[dockerfile.index(of_kind(dockerfile, "USER")[-1]) :]
    assert {"ENTRYPOINT", "CMD"} <= {instruction.name for instruction in after}


def test_signals_reach_the_command(dockerfile: list[Instruction]) -> None:
    (entry,), (command,) = of_kind(dockerfile, "ENTRYPOINT"), of_kind(dockerfile, "CMD")
    assert json.loads(entry.arguments) == ["tini", "--"]
    assert json.loads(command.arguments) == ["baton", "serve"]
    assert of_kind(dockerfile, "STOPSIGNAL")[0].arguments == "SIGTERM"


def test_the_health_check_is_a_module_of_the_image(dockerfile: list[Instruction]) -> None:
    (check,) = of_kind(dockerfile, "HEALTHCHECK")
    command = json.loads(check.arguments.partition("CMD ")[2])
    assert command == ["python", "-I", "-m", health.__name__]


def test_variables_of_images_and_compose_are_settings(dockerfile: list[Instruction]) -> None:
    services = [yaml.safe_load(file.read_text())["services"] for file in FOLDER.glob("compose*.yaml")]
    names = [name for each in services for name in each["baton"]["environment"]]
    assert [name for name in names if name.startswith("BATON_") and name not in schema.variables()] == []
    # Any other would go before what is in a file of the user's.
    assert [name for name in environment(dockerfile) if name.startswith("BATON_")] == ["BATON_CONFIG"]


def configured(dockerfile: list[Instruction], **environ: str) -> ServeConfig:
    """What the image's command makes of the image's environment and the user's."""
    variables = environment(dockerfile) | environ
    ours = variables["BATON_CONFIG"] == f"/opt/baton/{IMAGE_FILE.name}"
    return settings.load(str(IMAGE_FILE if ours else variables["BATON_CONFIG"]), {}, variables)


def test_the_image_alone_serves_the_mounted_model_to_the_network(dockerfile: list[Instruction]) -> None:
    copied = [shlex.split(copy.arguments) for copy in of_kind(dockerfile, "COPY")]
    assert any(words[-2:] == ["/src/deploy/docker/image.yaml", "/opt/baton/"] for words in copied)
    config = configured(dockerfile)
    assert (config.model.path, config.router.host) == ("/models/model", "0.0.0.0")
    assert (config.cluster.runtime, config.cluster.ray_address) == ("process", None)


def test_variables_and_a_mounted_file_override_the_image(dockerfile: list[Instruction], tmp_path: pathlib.Path) -> None:
    file = tmp_path / "mounted.yaml"
    file.write_text("model: {path: /models/other}\nrouter: {host: 10.0.0.9}")
    config = configured(dockerfile, BATON_CONFIG=str(file))
    assert (config.model.path, config.router.host) == ("/models/other", "10.0.0.9")
    config = configured(dockerfile, BATON_MODEL="/models/third", BATON_RUNTIME="ray")
    assert (config.model.path, config.router.host, config.cluster.runtime) == ("/models/third", "0.0.0.0", "ray")


@pytest.mark.parametrize("program", ["tini", "wget", "rsync", "tmux"])
def test_what_others_call_in_the_container_is_installed(dockerfile: list[Instruction], program: str) -> None:
    """By the entry point; by KubeRay's probes; by `ray up` and `ray exec --tmux`."""
    (install,) = [run.arguments for run in of_kind(dockerfile, "RUN") if "apt-get install" in run.arguments]
    assert program in shlex.split(install.partition("apt-get install")[2].partition("&&")[0])


def test_ray_up_finds_the_home_of_the_images_user(dockerfile: list[Instruction]) -> None:
    assert environment(dockerfile)["HOME"] == "/home/baton" == of_kind(dockerfile, "WORKDIR")[-1].arguments


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_the_compose_file_is_valid(name: str) -> None:
    jsonschema.Draft202012Validator(COMPOSE_SCHEMA).validate(yaml.safe_load((FOLDER / name).read_text()))


def test_what_compose_mounts_and_builds_exists() -> None:
    compose: Any = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            source = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", volume).partition(":")[0]
            assert source in compose["volumes"] or (FOLDER / source).exists(), volume
        assert not re.search(r":latest$", service["image"])
        assert "no-new-privileges:true" in service["security_opt"]
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), "whoever wants it in a network says so"
    build = compose["services"]["baton"]["build"]
    assert (FOLDER / build["context"]).resolve() == REPOSITORY
    assert (REPOSITORY / "deploy/docker/Dockerfile").exists()


def test_prometheus_of_compose_finds_the_router_and_its_workers() -> None:
    services: Any = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    # A container that shared the network of another would lose it when that one is started anew.
    assert not [name for name, service in services.items() if "network_mode" in service]
    assert services["baton"]["environment"]["BATON_WORKER_HOST"] == services["baton"]["hostname"] == "baton"
    assert "./prometheus.yml:/etc/prometheus/prometheus.yml:ro" in services["prometheus"]["volumes"]
    text = (FOLDER / "prometheus.yml").read_text()
    usual = (REPOSITORY / "deploy" / "prometheus" / "prometheus.yml").read_text()
    assert yaml.safe_load(text) == yaml.safe_load(usual.replace("http://127.0.0.1:8000/", "http://baton:8000/"))


def test_compose_gives_a_container_time_to_drain() -> None:
    baton = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]["baton"]
    match = SECONDS.fullmatch(baton["stop_grace_period"])
    assert match is not None
    assert int(match[1]) > float(baton["environment"]["BATON_DRAIN_S"]) + 2 * STOP_GRACE_S


def test_the_wheel_holds_every_module_and_the_page(tmp_path: pathlib.Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for package in PACKAGES:
        shutil.copytree(
            REPOSITORY / package, source / package, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors")
        )
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    done = subprocess.run([*build, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        str(path.relative_to(source))
        for path in source.rglob("*")
        if path.suffix in (".py", ".pyi", ".typed") or (path.is_file() and "static" in path.parts)
    }
    wanted = {path for path in wanted if path.partition("/")[0] in PACKAGES}
    assert any("static" in path for path in wanted)
    assert wanted - packed == set()
