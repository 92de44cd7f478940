"""The command line that scripts rely on."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import click
import grpc
import pytest
from click.testing import CliRunner, Result

from baton import __version__
from baton.config import ServeConfig
from baton.v1 import inference_pb2
from deploy import cli, settings
from tests.baton.fake_inference import FakeInference, ending, piece, serving


@pytest.fixture
def server() -> Iterator[FakeInference]:
    with serving() as fake:
        yield fake


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, arguments)


def test_the_commands_and_their_flags_are_these() -> None:
    flags = {name: [parameter.opts[0] for parameter in command.params] for name, command in cli.main.commands.items()}
    assert flags == {
        "serve": [
            "--model",
            "--served-model-name",
            "--prefill-workers",
            "--decode-workers",
            "--host",
            "--grpc-port",
            "--http-port",
            "--device",
            "--dtype",
            "--block-size",
            "--kv-cache-bytes",
            "--max-model-len",
            "--runtime",
            "--ray-address",
            "--config",
            "--ready-file",
        ],
        "generate": ["prompt", "--max-tokens", "--temperature", "--seed", "--target"],
        "status": ["--target"],
    }


def test_every_flag_of_serve_but_config_sets_one_value() -> None:
    assert {parameter.opts[0] for parameter in cli.serve.params} - {"--config"} == set(settings.FLAGS)


@pytest.mark.parametrize("flag", sorted(set(settings.FLAGS) - {"--model"}))
def test_the_defaults_that_help_shows_are_the_configs(flag: str) -> None:
    (option,) = [parameter for parameter in cli.serve.params if parameter.opts[0] == flag]
    assert isinstance(option, click.Option)
    assert option.help is not None
    value: object = ServeConfig.model_validate({"model": {"path": "m"}})
    for name in settings.FLAGS[flag]:
        value = getattr(value, name)
    shown = re.search(r"\[default: (.*)\]", option.help)
    if value in (None, ""):
        assert shown is None or not shown[1].isdecimal()
    else:
        assert shown is not None
        assert shown[1] == str(value)


def test_the_version() -> None:
    assert run("--version").output == f"baton, version {__version__}\n"


def test_generate_streams_text_to_stdout_and_times_to_stderr(server: FakeInference) -> None:
    server.responses = [piece("Once", 1), piece(" upon", 2, finish=2), ending(4, 3, 2)]
    result = run(
        "generate", "tell", "--max-tokens", "2", "--temperature", "0", "--seed", "9", "--target", server.target
    )
    assert result.exit_code == 0
    assert result.stdout == "Once upon\n"
    assert result.stderr == (
        "4 prompt tokens (3 cached), 2 generated | queue 1.0 ms, reserve 0.0 ms, prefill 250.0 ms, transfer 0.0 ms, "
        "first step 0.0 ms, decode 500.0 ms | prefill-0 -> decode-0\n"
    )
    sampling = server.requests[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.seed) == (2, 0.0, 9)


def test_status_shows_the_workers(server: FakeInference) -> None:
    worker = inference_pb2.WorkerStatus(
        name="decode-0", epoch=2, pid=77, address="127.0.0.1:8", healthy=True, free_blocks=60, total_blocks=64
    )
    server.status = inference_pb2.GetClusterStatusResponse(model="demo", version="0.1.0", ready=True, workers=[worker])
    result = run("status", "--target", server.target)
    assert result.exit_code == 0
    assert "demo, Baton 0.1.0: ready" in result.stdout
    for cell in ("decode-0", "127.0.0.1:8", "4/64", "healthy"):
        assert cell in result.stdout


@pytest.mark.parametrize("command", [("generate", "hi"), ("status",)])
def test_nobody_at_the_target_is_said_in_one_line(command: tuple[str, ...]) -> None:
    result = run(*command, "--target", "127.0.0.1:1")
    assert result.exit_code == 1
    assert re.fullmatch(r"error: 127.0.0.1:1: .*is `baton serve` running there\?.*\n", result.stderr)


def test_a_refused_request_is_the_users_to_mend(server: FakeInference) -> None:
    server.failure = (grpc.StatusCode.INVALID_ARGUMENT, "max_tokens: must be at least 1")
    result = run("generate", "hi", "--target", server.target)
    assert (result.exit_code, result.stderr) == (2, "error: max_tokens: must be at least 1\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "error: --model is required"),
        (("--model", "/nowhere"), "error: --model /nowhere: no such directory"),
        (("--model", "m", "--decode-workers", "0"), "error: --decode-workers 0: "),
        (("--model", "m", "--block-size", "7"), "error: --block-size 7: "),
        (("--config", "/nowhere.yaml"), "error: --config /nowhere.yaml: "),
    ],
)
def test_serve_says_what_is_wrong_and_exits_with_2(arguments: tuple[str, ...], message: str) -> None:
    result = run("serve", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(message)


def test_flags_and_file_reach_the_config(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "baton.yaml"
    file.write_text("model: {path: /from/file}\nrouter: {grpc_port: 70000}")
    result = run("serve", "--config", str(file))
    assert (result.exit_code, "router.grpc_port" in result.stderr) == (2, True)
    result = run("serve", "--config", str(file), "--grpc-port", "0")
    assert result.stderr == "error: --model /from/file: no such directory\n"


def test_the_command_line_loads_no_heavy_package() -> None:
    code = (
        "import sys; from deploy import cli, serve; from baton import client;"
        "print({'torch', 'ray', 'transformers', 'numba'} & set(sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"
