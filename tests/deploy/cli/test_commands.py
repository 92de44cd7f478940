"""The command line that scripts rely on."""

from __future__ import annotations

import json
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
from deploy import settings
from deploy.cli import commands
from tests.baton.fake_inference import FakeInference, ending, piece, serving


@pytest.fixture
def server() -> Iterator[FakeInference]:
    with serving() as fake:
        yield fake


def run(*arguments: str) -> Result:
    return CliRunner().invoke(commands.main, arguments)


def params_of(name: str) -> dict[str, click.Parameter]:
    command = commands.main.commands[name]
    return {param.opts[0]: param for param in command.get_params(click.Context(command)) if "--help" not in param.opts}


def test_the_commands_and_their_flags_are_these() -> None:
    assert {name: list(params_of(name)) for name in commands.main.commands} == {
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
            "--attention",
            "--batch-invariant",
            "--num-threads",
            "--block-size",
            "--kv-cache-bytes",
            "--gpu-memory-utilization",
            "--max-model-len",
            "--max-batch-tokens",
            "--max-batch-seqs",
            "--prefill-tensor-parallel-size",
            "--decode-tensor-parallel-size",
            "--local-prefill-tokens",
            "--transports",
            "--max-queued-requests",
            "--tool-call-format",
            "--reasoning-format",
            "--tls-cert-file",
            "--tls-key-file",
            "--runtime",
            "--ray-address",
            "--worker-host",
            "--drain-s",
            "--log-level",
            "--log-format",
            "--ready-file",
            "--config",
            "--print-config",
        ],
        "generate": ["prompt", "--max-tokens", "--temperature", "--seed", "--json", "--target", "--tls-ca"],
        "chat": ["--system", "--max-tokens", "--temperature", "--seed", "--model", "--url", "--tls-ca"],
        "status": ["--watch", "--json", "--target", "--tls-ca"],
        "completion": ["shell"],
        "bench": [],
    }


def test_every_flag_of_serve_but_two_sets_one_value() -> None:
    assert set(params_of("serve")) - {"--config", "--print-config"} == set(settings.FLAGS)


@pytest.mark.parametrize("flag", sorted(set(settings.FLAGS) - {"--model"}))
def test_the_defaults_that_help_shows_are_the_configs(flag: str) -> None:
    option = params_of("serve")[flag]
    assert isinstance(option, click.Option)
    assert option.help is not None
    value: object = ServeConfig.model_validate({"model": {"path": "m"}})
    for name in settings.FLAGS[flag]:
        value = getattr(value, name)
    shown = re.search(r"\[default: (.*)\]", option.help)
    if value in (None, ""):
        assert shown is None
    else:
        assert shown is not None
        text = json.dumps(value) if isinstance(value, bool) else str(value)
        assert shown[1] == (",".join(value) if isinstance(value, tuple) else text)


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


def test_a_prompt_may_come_from_stdin(server: FakeInference) -> None:
    server.responses = [piece("Once", 1, finish=2), ending(4, 3, 1)]
    result = CliRunner().invoke(commands.main, ["generate", "-", "--target", server.target], input="tell me\n")
    assert (result.exit_code, server.requests[0].text) == (0, "tell me\n")


def test_generate_prints_one_object_where_it_is_asked_to(server: FakeInference) -> None:
    server.responses = [piece("Once", 1), piece(" upon", 2, finish=2), ending(4, 3, 2)]
    result = run("generate", "tell", "--json", "--target", server.target)
    assert result.stderr == ""
    answer = json.loads(result.stdout)
    assert set(answer) == {"request_id", "text", "finish_reason", "token_ids", "usage", "timings"}
    assert (answer["text"], answer["finish_reason"], answer["token_ids"]) == ("Once upon", "length", [1, 2])
    assert answer["usage"] == {"prompt_tokens": 4, "cached_tokens": 3, "completion_tokens": 2}
    assert answer["timings"]["prefill_s"] == 0.25


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_for_the_shell(shell: str) -> None:
    assert f"_BATON_COMPLETE={shell}_complete" in run("completion", shell).stdout


def test_flags_are_completed() -> None:
    environ = {"_BATON_COMPLETE": "bash_complete", "COMP_WORDS": "baton serve --log-", "COMP_CWORD": "2"}
    answer = CliRunner().invoke(commands.main, [], prog_name="baton", env=environ)
    assert answer.stdout.splitlines() == ["plain,--log-level", "plain,--log-format"]


def test_the_configuration_is_printed_and_nothing_is_started() -> None:
    result = run("serve", "--model", "/nowhere", "--http-port", "9", "--print-config")
    assert result.exit_code == 0
    assert "  http_port: 9  # --http-port\n" in result.stdout


def test_a_variable_that_is_no_setting_is_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_HTPP_PORT", "1")
    result = run("serve", "--model", "/nowhere")
    assert result.stderr.startswith("warning: BATON_HTPP_PORT is no setting; did you mean BATON_HTTP_PORT?\n")


WORKER = inference_pb2.WorkerStatus(
    name="decode-0", epoch=2, pid=77, address="127.0.0.1:8", healthy=True, free_blocks=60, total_blocks=64
)


def test_status_is_an_object_where_it_is_asked_to(server: FakeInference) -> None:
    server.status = inference_pb2.GetClusterStatusResponse(model="demo", version="0.1.0", ready=True, workers=[WORKER])
    answer = json.loads(run("status", "--json", "--target", server.target).stdout)
    assert set(answer) == {"version", "model", "ready", "queued", "running", "workers"}
    assert answer["workers"] == [
        {
            "role": "",
            "name": "decode-0",
            "epoch": 2,
            "address": "127.0.0.1:8",
            "metrics_address": "",
            "pid": 77,
            "healthy": True,
            "running": 0,
            "waiting": 0,
            "free_blocks": 60,
            "total_blocks": 64,
        }
    ]


def test_status_shows_the_workers(server: FakeInference) -> None:
    server.status = inference_pb2.GetClusterStatusResponse(model="demo", version="0.1.0", ready=True, workers=[WORKER])
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
    file.write_text("model: /from/file\ngrpc_port: 70000")
    result = run("serve", "--config", str(file))
    assert (result.exit_code, "grpc_port 70000" in result.stderr) == (2, True)
    result = run("serve", "--config", str(file), "--grpc-port", "0")
    assert result.stderr == "error: --model /from/file: no such directory\n"


def test_the_command_line_loads_no_heavy_package() -> None:
    code = (
        "import sys; from deploy import serve; from deploy.cli import commands; from baton import client;"
        "print({'torch', 'ray', 'transformers', 'numba', 'opentelemetry'} & set(sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"
