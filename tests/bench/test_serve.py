"""`baton bench serve` from the command line: a real router in front of mock workers, and results that load."""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from click.testing import CliRunner, Result

from baton.config import ModelConfig, ServeConfig
from bench.load.measurement import Measured
from bench.load.measures import Measures
from bench.load.runner import LoadRun
from bench.load.targets import ServedModel
from bench.report import read_report
from bench.serve import command, warnings_about
from deploy.cli import commands
from router.server import RouterServer
from tests.bench.load.outcomes import make_outcome
from tests.bench.load.sse_server import sse_server
from tests.bench.load.test_sse import DONE, text, usage
from tests.router.alone import running_router

MODEL = pathlib.Path(__file__).parents[2] / "deploy" / "demo" / "model"
SHORT = ("--input-tokens", "4:16", "--output-tokens", "3", "--num-requests", "6")


@pytest.fixture(scope="module")
def router() -> Iterator[RouterServer]:
    with running_router(ServeConfig(model=ModelConfig(path=str(MODEL)))) as server:
        yield server


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(commands.main, ["bench", "serve", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result


def test_its_flags_are_these() -> None:
    assert [param.opts[0] for param in command.params] == [
        "--target",
        "--api",
        "--model",
        "--api-key",
        "--tls-ca",
        "--continuous-usage",
        "--workload",
        "--trace",
        "--input-tokens",
        "--output-tokens",
        "--num-requests",
        "--groups",
        "--prefix-tokens",
        "--turns",
        "--think-s",
        "--start-s",
        "--end-s",
        "--time-scale",
        "--length-scale",
        "--max-input-tokens",
        "--max-output-tokens",
        "--rate",
        "--burstiness",
        "--concurrency",
        "--warm-up",
        "--vocab-size",
        "--seed",
        "--slo-ttft-ms",
        "--slo-tpot-ms",
        "--details",
        "--output",
        "--plot",
    ]


def test_a_result_has_what_was_asked_and_what_was_measured(router: RouterServer, tmp_path: pathlib.Path) -> None:
    output, plot = tmp_path / "result.json", tmp_path / "result.html"
    result = run(
        *("--target", router.url, *SHORT, "--rate", "500", "--slo-ttft-ms", "60000", "--details"),
        *("--output", str(output), "--plot", str(plot), "--api-key", "secret-key"),
    )
    assert result.exit_code == 0, result.output
    assert re.search(r"complete +6 ", result.stdout)
    assert re.search(r"output tokens +18 ", result.stdout)
    found = read_report(output)
    assert found["name"] == "serve"
    assert (
        found["parameters"].items() >= {"workload": "random", "input_tokens": "4:16", "rate": 500.0, "seed": 0}.items()
    )
    measured = found["results"]
    assert (measured["num_due"], measured["num_completed"], measured["output_tokens"]) == (6, 6, 18)
    assert measured["goodput"]["attainment"] == 1.0
    assert measured["ttft"]["count"] == 6
    assert [sum(request["token_counts"]) for request in measured["requests"]] == [3] * 6
    assert "secret-key" not in output.read_text()
    page = plot.read_text()
    assert "data:image/png;base64," in page
    assert "time to first token" in page
    assert "http" not in page.replace(router.url, "")


@pytest.mark.parametrize(
    ("options", "num_answers"),
    [
        (("--workload", "shared-prefix", "--groups", "2", "--prefix-tokens", "32", "--concurrency", "2"), 6),
        (("--workload", "multi-turn", "--turns", "2", "--rate", "1000"), 12),
        (("--rate", "inf", "--concurrency", "3"), 6),
    ],
)
def test_workloads_over_grpc(
    router: RouterServer, tmp_path: pathlib.Path, options: tuple[str, ...], num_answers: int
) -> None:
    output = tmp_path / "result.json"
    result = run("--target", router.grpc_address, *SHORT, *options, "--output", str(output))
    assert result.exit_code == 0, result.output
    assert read_report(output)["results"]["num_completed"] == num_answers


def test_a_trace_is_cut_to_the_model(router: RouterServer, tmp_path: pathlib.Path) -> None:
    trace, output = tmp_path / "trace.jsonl", tmp_path / "result.json"
    rows = [{"timestamp": at, "input_length": 600, "output_length": 20, "hash_ids": [0, at]} for at in (0, 10, 20)]
    trace.write_text("\n".join(map(json.dumps, rows)))
    arguments = ("--workload", "mooncake", "--trace", str(trace), "--max-output-tokens", "4", "--num-requests", "2")
    result = run("--target", router.url, *arguments, "--output", str(output))
    assert result.exit_code == 0, result.output
    measured = read_report(output)["results"]
    assert (measured["num_completed"], measured["input_tokens"], measured["output_tokens"]) == (2, 2 * 508, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--rate, --concurrency: at least one must be given"),
        (("--rate", "0"), "Invalid value for '--rate'"),
        (("--rate", "1", "--input-tokens", "9:2"), "Invalid value for '--input-tokens': must be at least 1"),
        (("--workload", "azure"), "--trace: must name the file for --workload azure"),
        (("--rate", "1", "--target", "nowhere"), "nowhere: must be http://"),
        (("--rate", "1", "--output", "/nowhere/a.json"), "Invalid value for '--output': /nowhere is no folder"),
        (("--rate", "1", "--plot", "a.pdf"), "must end with .png or .html"),
    ],
)
def test_bad_options_are_told_before_anything_is_sent(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_part_of_a_trace_without_rows_is_refused(router: RouterServer, tmp_path: pathlib.Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n")
    result = run("--target", router.url, "--workload", "azure", "--trace", str(trace), "--start-s", "5")
    assert (result.exit_code, "has no rows in the part that was asked for" in result.stderr) == (2, True)


def test_a_server_that_is_not_there_is_one_line() -> None:
    result = run("--target", "http://127.0.0.1:1", "--rate", "1")
    assert result.exit_code == 1
    assert re.fullmatch(r"Error: http://127\.0\.0\.1:1/v1 cannot be reached: .*\n", result.stderr)


def test_requests_that_do_not_fit_are_told_by_the_warm_up(router: RouterServer) -> None:
    result = run("--target", router.grpc_address, "--input-tokens", "600", "--rate", "1")
    assert result.exit_code == 1
    assert "max_model_len" in result.stderr


async def test_an_interrupt_shows_what_was_measured(tmp_path: pathlib.Path) -> None:
    output = tmp_path / "result.json"
    async with sse_server() as server:
        server.answers.append([text("a"), text("b") + usage(2), DONE, b""])
        arguments = ("--target", server.url, "--concurrency", "1", "--warm-up", "0", "--output", str(output))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "deploy.cli", "bench", "serve", *arguments),
            stdout=subprocess.PIPE,
            env={**os.environ, "COLUMNS": "100"},
        )
        await server.unanswered.wait()
        process.send_signal(signal.SIGINT)
        stdout, _ = await process.communicate()
    assert process.returncode == 128 + signal.SIGINT
    assert re.search(rb"complete +1 ", stdout)
    measured = read_report(output)["results"]
    assert (measured["interrupted"], measured["num_due"], measured["output_tokens"]) == (True, 2, 2)
    assert measured["errors"] == {"cancelled": 1}


def test_what_makes_the_numbers_doubtful_is_told() -> None:
    refused = make_outcome(error="unavailable", ended_s=1.0)
    refused.error_message = "no worker"
    load_run = LoadRun([make_outcome(1.0, 2.0, completion_tokens=5), refused], 0.0, 2.0, interrupted=False)
    measured = Measured(ServedModel("m"), load_run, Measures.of(load_run), client_cpu_share=0.9)
    busy, several, failed = warnings_about(measured)
    assert "took 90% of a core" in busy
    assert "tell of 2 tokens, the usage of 5" in several
    assert failed == "1 requests ended by unavailable: no worker"


def test_the_help_loads_no_command_and_this_one_nothing_heavy() -> None:
    program = (
        "import sys; from click.testing import CliRunner; from deploy.cli import commands;"
        "assert 'serve' in CliRunner().invoke(commands.main, ['bench', '--help']).output;"
        "print([name for name in sys.modules if name.startswith('bench.') and name != 'bench.cli']);"
        "import bench.serve; print({'torch', 'ray', 'transformers', 'matplotlib', 'aiohttp'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "set()"]


def test_no_such_command() -> None:
    result = CliRunner().invoke(commands.main, ["bench", "nothing"])
    assert (result.exit_code, "No such command 'nothing'" in result.stderr) == (2, True)
