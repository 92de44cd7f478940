"""The files for `ray up`, by Ray's own schema and own preparation; and what launch.sh refuses."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from deploy import settings
from deploy.placement import Node, choose, make_request

FOLDER = pathlib.Path(__file__).parents[3] / "deploy" / "ray"
CLUSTERS = ["aws.yaml", "on-premise.yaml"]


def load(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


def ray_schema() -> Any:
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    return json.loads((pathlib.Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text())


def launch(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(FOLDER / "launch.sh"), *arguments],
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", **environment},
        capture_output=True,
        text=True,
    )


def options_of_ray_start(commands: list[str]) -> set[str]:
    return {option for command in commands for option in re.findall(r"(--[a-z-]+)", command)}


@pytest.mark.parametrize("name", CLUSTERS)
def test_ray_takes_the_file(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = load(name)
    jsonschema.validate(config, ray_schema())
    validate_config(prepare_config(config))


@pytest.mark.parametrize("name", [*CLUSTERS, "launch.sh"])
def test_every_option_is_one_of_ray_start(name: str) -> None:
    from ray.scripts.scripts import start

    text = (FOLDER / name).read_text()
    if name == "launch.sh":
        commands = [line for line in text.splitlines() if "ray start" in line or line.startswith("options=")]
    else:
        config = yaml.safe_load(text)
        commands = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    known = set(re.findall(r"(--[a-z-]+)", CliRunner().invoke(start, ["--help"]).output))
    known |= {option for parameter in start.params for option in parameter.opts}
    assert options_of_ray_start([line for line in commands if not line.startswith("#")]) - known == set()


@pytest.mark.parametrize("name", CLUSTERS)
def test_ray_finds_the_files_to_copy_from_the_top_of_the_repository(
    name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.autoscaler._private.util import hash_runtime_conf

    monkeypatch.chdir(FOLDER.parents[1])
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0123")
    config = load(name)
    _, contents = hash_runtime_conf(config["file_mounts"], [], [name], generate_file_mounts_contents_hash=True)
    assert contents
    assert config["file_mounts"]["~/baton.yaml"] == "deploy/ray/baton.yaml"


def test_options_of_docker_are_not_those_that_ray_adds() -> None:
    from ray.autoscaler._private.docker import docker_start_cmds

    docker = load("aws.yaml")["docker"]
    command = docker_start_cmds("ubuntu", docker["image"], [], "baton", docker["run_options"], "", True, "/home/baton")
    assert len(re.findall(r"--net(?:work)?[= ]", command)) == 1


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_node_asks_for_the_token(name: str) -> None:
    config = load(name)
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        (start,) = (command for command in commands if "ray start" in command)
        assert "RAY_AUTH_MODE=token" in start
    assert "~/.ray/auth_token" in config["file_mounts"]


def test_workers_fit_the_nodes_that_aws_starts() -> None:
    types = load("aws.yaml")["available_node_types"]
    flags = {"--model": "m", "--device": "cuda", "--ray-address": "auto"}
    config = settings.load(str(FOLDER / "baton.yaml"), flags, {})
    nodes = [Node(name, name, kind["resources"], kind["labels"]) for name, kind in types.items()]
    for role in ("prefill", "decode"):
        request = make_request(config, role, nodes)
        assert request.resources["GPU"] == 1
        node = choose(nodes, request, [])
        assert node is not None
        assert node.id == role


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "launch.sh head"),
        (["join", "10.0.0.1"], "usage: launch.sh join HEAD_IP prefill|decode|both|router"),
        (["join", "10.0.0.1", "prefil"], "ROLE is prefill, decode, both or router, not prefil"),
        (["join", "10.0.0.1", "prefill"], "no token of the cluster; copy ~/.ray/auth_token from the head"),
        (["serve"], "no token of the cluster"),
    ],
)
def test_the_launch_script_says_what_is_missing(arguments: list[str], message: str) -> None:
    done = launch(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize(("given", "used"), [("", "baton.yaml"), ("image.yaml", "baton.yaml"), ("my.yaml", "my.yaml")])
def test_the_launch_script_takes_the_users_configuration_or_its_own(
    given: str, used: str, tmp_path: pathlib.Path
) -> None:
    """Not the one that the images set for a container by itself, which lies beside the script there."""
    shutil.copy(FOLDER / "launch.sh", tmp_path)
    (tmp_path / "baton").write_text('#!/bin/sh\necho "$BATON_CONFIG" "$@"\n')
    (tmp_path / "baton").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RAY_AUTH_MODE": "disabled"}
    environment["BATON_CONFIG"] = given and str(tmp_path / given)
    done = subprocess.run([str(tmp_path / "launch.sh"), "serve"], env=environment, capture_output=True, text=True)
    assert done.stdout == f"{tmp_path / used} serve --ray-address auto\n"


def test_no_folder_of_manifests_hides_the_ray_package() -> None:
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    assert "site-packages" in spec.origin
    assert not (FOLDER / "__init__.py").exists()
