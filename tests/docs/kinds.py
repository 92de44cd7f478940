"""What becomes of each kind of command on the pages: it runs as it stands, or it is checked as far as a test can.

A command that no row of `KINDS` knows fails its test.
"""

from __future__ import annotations

import itertools
import pathlib
import re
import shlex
import tomllib
from collections.abc import Callable, Sequence
from typing import Any

import click
import yaml
from click.testing import CliRunner

from baton.config import ServeConfig
from bench.servers import parse_server
from deploy.cli import commands
from tests.docs import grpcurl
from tests.docs.commands import words
from tests.docs.markdown import REPOSITORY
from tests.docs.workplace import Workplace
from tests.tools import NODE_FOLDER, tool

Check = Callable[[list[str], Workplace], None]

_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
_KUBECTL_VERBS = {
    *("apply", "create", "delete", "describe", "diff", "exec", "get", "kustomize", "label", "logs", "port-forward"),
    *("rollout", "scale", "wait"),
}
_RAY_VERBS = {"up", "down", "start", "stop", "status", "attach", "exec", "submit", "job"}


def serve(words: list[str], workplace: Workplace) -> None:
    """The flags, the environment and the file make a configuration, and the files that it names are there.

    A router with keys or TLS of its own is started, on mock workers, for what follows on the page.
    """
    environment, (_, *arguments) = split_environment(words)
    arguments = [word for word in arguments if word != "&"]
    result = CliRunner().invoke(commands.main, [*arguments, "--print-config"], env=environment, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    config = ServeConfig.model_validate(yaml.safe_load(result.stdout))
    # Images and volumes have their models elsewhere.
    is_elsewhere = config.model.path.startswith("/")
    assert is_elsewhere or (workplace.folder / config.model.path / "config.json").is_file(), config.model.path
    if config.router.tls_cert_file is not None:
        workplace.serve(config)


def bench(words: list[str], workplace: Workplace) -> None:
    """The benchmark has these flags, and what is to be compared can be started."""
    _, (_, _, name, *flags) = split_environment(words)
    context = click.Context(commands.main)
    group = commands.main.commands["bench"]
    assert isinstance(group, click.Group)
    command = group.get_command(context, name)
    assert command is not None, name
    values, _, _ = command.make_parser(click.Context(command)).parse_args(flags)
    for server in values.get("servers", ()):
        parse_server(server, peer_python=values.get("peer_python"))


def gpu_bench(words: list[str], workplace: Workplace) -> None:
    """The benchmark of GPUs has these flags."""
    # Not before the tests of kernels have decided how Triton runs them.
    from bench.gpu.__main__ import command

    _, (_, _, _, *flags) = split_environment(words)
    command.make_parser(click.Context(command)).parse_args(flags)


def make(words: list[str], workplace: Workplace) -> None:
    """The targets exist. `.ci/run` runs check and test; `make run` is what tests/deploy/test_tour.py runs."""
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in (word for word in words[1:] if "=" not in word and not word.startswith("-")):
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target


def pip(words: list[str], workplace: Workplace) -> None:
    """What is installed from here has the extras that are named; anything else is what the tests have installed."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    stated = list(itertools.chain(project["dependencies"], *project["optional-dependencies"].values()))
    known = {re.split(r"[^\w.-]", requirement)[0] for requirement in stated}
    for word in (word for word in words[words.index("install") + 1 :] if not word.startswith("-")):
        name, _, extras = word.partition("[")
        if (workplace.folder / name).exists():
            wanted = filter(None, extras.rstrip("]").split(","))
            assert set(wanted) <= set(project["optional-dependencies"]), word
        else:
            assert re.split(r"[=<>~!]", name)[0] in known, word


def npm(words: list[str], workplace: Workplace) -> None:
    """Every package that would be installed is one that the tests run with."""
    installed = {path.parent.name for path in (NODE_FOLDER / "node_modules").glob("*/package.json")}
    installed |= {
        f"@{path.parent.parent.name[1:]}/{path.parent.name}"
        for path in NODE_FOLDER.glob("node_modules/@*/*/package.json")
    }
    named = [word for word in words[2:] if not word.startswith("-")]
    if "--prefix" in words:
        folder = words[words.index("--prefix") + 1]
        named.remove(folder)
        package = yaml.safe_load((REPOSITORY / folder / "package.json").read_text())
        named += package["dependencies"]
    assert set(named) <= installed


def compose(words: list[str], workplace: Workplace) -> None:
    """The file holds services."""
    for path in _files(words, "-f", "--file") or ["compose.yaml"]:
        assert yaml.safe_load((workplace.folder / path).read_text())["services"]


def docker(words: list[str], workplace: Workplace) -> None:
    """A Dockerfile that is named exists, and the build's folder does; images to run cannot be had here."""
    assert words[1] in {"build", "run", "pull", "push", "logs", "stop"}, words
    for path in _files(words, "-f", "--file"):
        assert (workplace.folder / path).read_text().lstrip().startswith(("#", "FROM", "ARG"))
    if words[1] == "build":
        assert (workplace.folder / words[-1]).is_dir(), words


def kubectl(words: list[str], workplace: Workplace) -> None:
    """The verb exists, and files hold Kubernetes objects; tests/deploy validates those against their schemas."""
    verb = next(word for word in words[1:] if not word.startswith("-"))
    assert verb in _KUBECTL_VERBS, words
    for path in _files(words, "-f", "--filename"):
        if path == "-" or "://" in path:
            continue
        found = workplace.folder / path
        for file in [found] if found.is_file() else sorted(found.glob("*.y*ml")):
            assert all({"apiVersion", "kind"} <= set(each) for each in _documents(file)), file
        assert found.exists(), path
    for path in _files(words, "-k", "--kustomize"):
        assert (workplace.folder / path / "kustomization.yaml").is_file(), path


def ray(words: list[str], workplace: Workplace) -> None:
    """The verb exists, and files are YAML."""
    assert words[1] in _RAY_VERBS, words
    for path in (word for word in words[2:] if word.endswith((".yaml", ".yml"))):
        assert list(_documents(workplace.folder / path)), path


def script(words: list[str], workplace: Workplace) -> None:
    """The script exists, may be executed, and is good Bash; what it gives to `baton serve` is checked as that is."""
    environment, arguments = split_environment(words)
    index, path = next((index, word) for index, word in enumerate(arguments) if word.endswith(".sh"))
    assert (workplace.folder / path).stat().st_mode & 0o111, path
    workplace.run_shell(path, f"bash -n {shlex.quote(path)}")
    if arguments[index + 1 : index + 2] == ["serve"]:
        assignments = [f"{name}={value}" for name, value in environment.items()]
        serve([*assignments, "baton", *arguments[index + 1 :]], workplace)


def prometheus(words: list[str], workplace: Workplace) -> None:
    """`promtool` accepts the configuration, and with it the rules."""
    path = next(word.partition("=")[2] for word in words if word.startswith("--config.file="))
    workplace.run_shell(path, f"{tool('promtool')} check config {shlex.quote(path)}")


# In this order; the first that matches counts. None: it runs as it stands.
KINDS: Sequence[tuple[str, Check | None]] = [
    (r"(\S*/)?baton serve\b(?!.*--(help|print-config))", serve),
    # These take minutes.
    (r"(\S*/)?baton bench (checkpoint|compare|engine|interference|kernels|router|startup|transfer)\b", bench),
    (r"\S*python3? -m bench\.gpu\b", gpu_bench),
    (r"(\S*/)?baton (serve|generate|status|chat|completion|bench|--version|--help)\b", None),
    (r"(curl|openssl|echo|export|mkdir|cat|ls|promtool) ", None),
    (r"\S*python3? (examples/|-m baton\.|\.ci/grpc_reference\.py$)", None),
    (r"node examples/", None),
    (r"grpcurl ", grpcurl.run),
    (r"make\b", make),
    (r"(\S*/)?(pip|python3? -m pip|uv pip) install ", pip),
    (r"npm (install|ci)\b", npm),
    (r"docker compose ", compose),
    (r"docker ", docker),
    (r"kubectl ", kubectl),
    (r"(\S*/)?ray ", ray),
    (r"(bash )?\S+\.sh\b", script),
    (r"prometheus ", prometheus),
]


def check_of(command: str) -> Check | None:
    """The row for a command; LookupError where none is for it."""
    _, arguments = split_environment(words(command))
    plain = " ".join(arguments)
    for pattern, check in KINDS:
        if re.match(pattern, plain):
            return check
    raise LookupError(f"no row of KINDS is for: {command}")


def split_environment(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """The assignments before a command, and the command."""
    count = next((index for index, word in enumerate(words) if not _ASSIGNMENT.match(word)), len(words))
    return dict(word.split("=", 1) for word in words[:count]), words[count:]


def _files(words: list[str], *flags: str) -> list[str]:
    """The values of a flag that may be given several times, after a blank or an equals sign."""
    found = [words[index + 1] for index, word in enumerate(words[:-1]) if word in flags]
    return found + [word.partition("=")[2] for word in words if word.partition("=")[0] in flags and "=" in word]


def _documents(file: pathlib.Path) -> list[Any]:
    return [document for document in yaml.safe_load_all(file.read_text()) if document is not None]
