"""The command line: `baton serve | generate | chat | status | completion | bench`.

What a command needs is imported when it runs: it starts fast. Exit codes: 0 done, 1 it failed, 2 the user can mend it,
130 interrupted. No tracebacks.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from baton import __version__
from bench.cli import bench
from deploy.cli import flags

if TYPE_CHECKING:
    from baton.client import Client

DEFAULT_TARGET = "127.0.0.1:50051"
DEFAULT_URL = "http://127.0.0.1:8000"
EXIT_INTERRUPTED = 130

_target = click.option(
    "--target",
    metavar="HOST:PORT",
    envvar="BATON_TARGET",
    default=DEFAULT_TARGET,
    show_default=True,
    show_envvar=True,
    help="The router.",
)
_tls_ca = click.option(
    "--tls-ca",
    metavar="FILE",
    envvar="BATON_TLS_CA",
    show_envvar=True,
    type=click.Path(exists=True, dir_okay=False),
    help="Connect with TLS and trust the authorities in this PEM file.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="baton")
def main() -> None:
    """Serves large language models with prefill and decode on separate workers.

    Clients send the API key in the environment variable BATON_API_KEY, where there is one.
    """


@main.command(cls=flags.SettingsCommand)
@click.option("--config", "file", metavar="FILE", help="YAML with any setting; the environment and flags override it.")
@click.option("--print-config", is_flag=True, help="Print the effective configuration and where it is from, and exit.")
@click.pass_context
def serve(context: click.Context, /, file: str | None, print_config: bool, **_: object) -> None:
    """Serve a model until SIGINT or SIGTERM.

    Each flag but --config and --print-config has an environment variable, such as BATON_HTTP_PORT for --http-port, and
    a name in the file, such as http_port.
    """
    with _errors_told():
        from deploy import settings

        for warning in settings.unknown_variables(os.environ):
            click.echo(f"warning: {warning}", err=True)
        found = settings.read(file, flags.given(context))
        if print_config:
            click.echo(found.to_yaml(), nl=False)
            return

        import asyncio

        from rich.console import Console

        from deploy.progress import Progress
        from deploy.serve import serve as run

        as_records = found.config.log.format == "json"
        progress = Progress(Console(), Console(stderr=True), as_records=as_records)
        if not asyncio.run(run(found.config, progress)):
            raise SystemExit(EXIT_INTERRUPTED)


@main.command()
@click.argument("prompt")
@click.option("--max-tokens", metavar="N", type=int, help="Most tokens to generate.")
@click.option("--temperature", metavar="T", type=float, help="0 is greedy.")
@click.option("--seed", metavar="N", type=int, help="The same seed gives the same text.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object when the answer is complete.")
@_target
@_tls_ca
def generate(
    prompt: str,
    max_tokens: int | None,
    temperature: float | None,
    seed: int | None,
    as_json: bool,
    target: str,
    tls_ca: str | None,
) -> None:
    """Stream the continuation of PROMPT to stdout, and the time of each stage to stderr.

    A PROMPT of - is read from stdin.
    """
    with _errors_told(target):
        from deploy.cli import generation

        text = sys.stdin.read() if prompt == "-" else prompt
        sampling = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        with _connect(target, tls_ca) as client:
            generation.generate(client, text, as_json=as_json, **sampling)


@main.command()
@click.option("--system", metavar="TEXT", help="What the model is told before the conversation.")
@click.option("--max-tokens", metavar="N", type=int, help="Most tokens of an answer.")
@click.option("--temperature", metavar="T", type=float, help="0 is greedy.")
@click.option("--seed", metavar="N", type=int, help="The same seed gives the same answers.")
@click.option("--model", metavar="NAME", help="The served model  [default: the only one]")
@click.option(
    "--url",
    metavar="URL",
    envvar="BATON_URL",
    default=DEFAULT_URL,
    show_default=True,
    show_envvar=True,
    help="The router's HTTP side.",
)
@_tls_ca
def chat(
    system: str | None,
    max_tokens: int | None,
    temperature: float | None,
    seed: int | None,
    model: str | None,
    url: str,
    tls_ca: str | None,
) -> None:
    """Talk with the model: one line is one message, and /help lists the commands.

    Ctrl-C stops an answer, Ctrl-D leaves. Where stdin is no terminal each line of it is a message, and only the answers
    go to stdout.
    """
    with _errors_told(url):
        from deploy.cli.chat import run
        from deploy.cli.chat_client import ChatClient

        client = ChatClient(url, api_key=os.environ.get("BATON_API_KEY"), tls_ca=tls_ca)
        sampling = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        run(client, system=system, model=model, sampling={k: v for k, v in sampling.items() if v is not None})


@main.command()
@click.option("--watch", is_flag=True, help="Show it anew every second until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; with --watch one a line.")
@_target
@_tls_ca
def status(watch: bool, as_json: bool, target: str, tls_ca: str | None) -> None:
    """Show the router and its workers."""
    with _errors_told(target):
        from deploy.cli.status import show, watch_status

        with _connect(target, tls_ca) as client:
            (watch_status if watch else show)(client, as_json=as_json)


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes this command in SHELL.

    For bash add `eval "$(baton completion bash)"` to ~/.bashrc, for zsh the same with zsh to ~/.zshrc; for fish run
    `baton completion fish > ~/.config/fish/completions/baton.fish`.
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(main, {}, "baton", "_BATON_COMPLETE").source())


main.add_command(bench)


def _connect(target: str, tls_ca: str | None) -> Client:
    """Connects to a router with the key in BATON_API_KEY, and with TLS where authorities are given."""
    from baton.client import Client, Tls

    api_key = os.environ.get("BATON_API_KEY") or None
    return Client(target, api_key=api_key, tls=None if tls_ca is None else Tls(ca_file=tls_ca))


@contextlib.contextmanager
def _errors_told(target: str = "") -> Iterator[None]:
    """Turns what can go wrong into one line and an exit code.

    Args:
        target: what a client talks to; empty for a server, which takes interrupts over itself.
    """
    try:
        if target:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        from baton.errors import BatonError, InvalidRequestError, UnauthenticatedError, UnavailableError
        from deploy.environment import quiet_grpc
        from deploy.errors import ServeError

        quiet_grpc()
        try:
            yield
        except ServeError as error:
            _fail(str(error), error.exit_code)
        except UnauthenticatedError as error:
            _fail(f"{target}: {error} (set BATON_API_KEY)", 1)
        except UnavailableError as error:
            _fail(f"{target}: {error} (is `baton serve` running there?)", 1)
        except BatonError as error:
            _fail(str(error), 2 if isinstance(error, InvalidRequestError) else 1)
        except BrokenPipeError:
            # Whoever read the output has had enough, as `head` has; what is buffered must not fail once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(EXIT_INTERRUPTED) from None


def _fail(message: str, exit_code: int) -> None:
    click.echo(f"error: {message}", err=True)
    raise SystemExit(exit_code)


if __name__ == "__main__":
    main()
