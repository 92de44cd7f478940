"""Servers under test come up, are measured, and leave no process behind, whatever they do."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import click
import psutil
import pytest

from baton.errors import UnavailableError
from bench.servers import Server, ServerSpec, await_end, parse_server

SCRIPT = pathlib.Path(__file__).with_name("tiny_server.py")
MODEL = pathlib.Path("/no/model")


def make_server(tmp_path: pathlib.Path, *words: str, ready_path: str = "/health", **limits: float) -> Server:
    spec = ServerSpec("tiny", (sys.executable, *words), ready_path=ready_path)
    return Server(spec, MODEL, tmp_path / "log", **limits)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(("mode", "stop_timeout_s"), [([], 30.0), (["stubborn"], 0.1)])
def test_a_server_comes_up_and_its_whole_tree_ends(
    mode: list[str], stop_timeout_s: float, tmp_path: pathlib.Path
) -> None:
    server = make_server(tmp_path, str(SCRIPT), "{port}", *mode, stop_timeout_s=stop_timeout_s)
    with server:
        ready_s = server.wait_ready()
        processes = server.processes()
        assert 0 < ready_s <= server.elapsed_s
        assert len(processes) == 2
        assert server.cpu_seconds() > 0
        largest = max(process.memory_full_info().uss for process in processes)
        assert largest < server.rss_bytes() < sum(process.memory_info().rss for process in processes)
        assert server.version() == "0.1"
    assert [process for process in processes if is_alive(process)] == []
    server.stop()


HARNESS = """
import pathlib, signal, sys
from bench.servers import Server, ServerSpec
idle = ServerSpec("idle", (sys.executable, "-c", "import signal; signal.pause()"))
server = Server(idle, pathlib.Path(), pathlib.Path(sys.argv[1]))
server.start()
print(server.process.pid, flush=True)
signal.pause()
"""


def test_a_server_ends_with_whoever_started_it(tmp_path: pathlib.Path) -> None:
    arguments = [sys.executable, "-c", HARNESS, str(tmp_path / "log")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as harness:
        assert harness.stdout is not None
        server = psutil.Process(int(harness.stdout.readline()))
        harness.kill()
    await_end(server.pid, 30)
    # It may stay a zombie until the machine's first process collects it.
    assert not is_alive(server)


def test_one_that_dies_is_told_with_the_end_of_its_log(tmp_path: pathlib.Path) -> None:
    program = "import sys; print(*range(50), sep='\\n'); sys.exit('no model there')"
    with make_server(tmp_path, "-c", program) as server, pytest.raises(UnavailableError) as failure:
        server.wait_ready()
    message = str(failure.value)
    assert message.startswith(f"tiny: ended with exit status 1 before it was ready; the end of {tmp_path}/log:")
    assert "  no model there" in message
    assert "  49\n" in message
    assert "  29\n" not in message


def test_one_that_is_never_ready_is_ended(tmp_path: pathlib.Path) -> None:
    server = make_server(tmp_path, str(SCRIPT), "{port}", ready_path="/never", ready_timeout_s=0.1)
    with server, pytest.raises(UnavailableError, match=r"tiny: was not ready in 0\.1 s"):
        server.wait_ready()
    assert server.process.poll() is not None


def test_a_program_that_is_missing_is_named(tmp_path: pathlib.Path) -> None:
    server = Server(ServerSpec("gone", ("/no/such/program",)), MODEL, tmp_path / "log")
    with pytest.raises(UnavailableError, match="gone: cannot start /no/such/program: No such file"):
        server.start()
    server.stop()


def test_places_are_filled_in_and_other_braces_stay() -> None:
    spec = ServerSpec("a", ("run", "--at={port}", "{model}", '{"port": {port}}'))
    assert spec.words(pathlib.Path("/m"), 7) == ["run", "--at=7", "/m", '{"port": 7}']


def test_presets_take_further_flags_and_variables() -> None:
    plain, named = parse_server("baton"), parse_server("slim=OMP_NUM_THREADS=1 A='x y' baton --block-size 32")
    assert (plain.name, named.name) == ("baton", "slim")
    assert named.command == (*plain.command, "--block-size", "32")
    assert named.environment == {**plain.environment, "OMP_NUM_THREADS": "1", "A": "x y"}
    peer = parse_server("OMP_NUM_THREADS=2 vllm --dtype=float32", peer_python="/peer/python")
    assert (peer.name, peer.command[0], peer.command[-1]) == ("vllm", "/peer/python", "--dtype=float32")
    assert peer.environment == {"VLLM_CPU_KVCACHE_SPACE": "2", "OMP_NUM_THREADS": "2"}


def test_both_presets_reuse_no_prefix_and_run_as_many_sequences() -> None:
    baton, vllm = parse_server("baton"), parse_server("vllm", peer_python="python")
    assert baton.environment["BATON_CACHE__ENABLE_PREFIX_CACHE"] == "false"
    assert "--no-enable-prefix-caching" in vllm.command
    limits = [
        spec.command[spec.command.index(flag) + 1]
        for spec, flag in ((baton, "--max-batch-seqs"), (vllm, "--max-num-seqs"))
    ]
    assert limits == ["64", "64"]


def test_any_command_is_a_server_of_its_own_name() -> None:
    spec = parse_server("mine=X=1 baton serve --model {model} --http-port {port}")
    assert spec == ServerSpec(
        "mine", ("baton", "serve", "--model", "{model}", "--http-port", "{port}"), {"X": "1"}, "/v1/models"
    )
    assert spec.shell_line() == "X=1 baton serve --model '{model}' --http-port '{port}'"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("vllm", "needs --peer-python"),
        ("a=", "names no command"),
        ("X=1", "names no command"),
        ("serve --model x", "a command needs a name"),
        ("a=run 'x", "No closing quotation"),
    ],
)
def test_what_describes_no_server_is_refused(text: str, problem: str) -> None:
    with pytest.raises(click.UsageError, match=problem):
        parse_server(text)


def test_the_preset_makes_a_configuration_of_baton() -> None:
    from click.testing import CliRunner

    from deploy.cli import commands

    spec = parse_server("baton")
    words = spec.words(MODEL, 8000)
    result = CliRunner().invoke(
        commands.main, [*words[words.index("serve") :], "--print-config"], env=dict(spec.environment)
    )
    assert result.exit_code == 0, result.output
    assert "enable_prefix_cache: false" in result.output
