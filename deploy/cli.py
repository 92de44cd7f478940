"""The command line: `baton serve | generate | status`. What a command needs is imported when it runs: it starts fast.

Exit codes: 0 done, 1 it failed, 2 the user can mend it, 130 interrupted. No tracebacks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import click

from baton import __version__

DEFAULT_TARGET = "127.0.0.1:50051"
EXIT_INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="baton")
def main() -> None:
    """Serves large language models with prefill and decode on separate workers."""
    from deploy.environment import quiet_grpc

    quiet_grpc()


@main.command()
@click.option("--model", metavar="DIR", help="The checkpoint's directory.")
@click.option(
    "--served-model-name", metavar="NAME", help="What clients call the model  [default: the directory's name]"
)
@click.option("--prefill-workers", metavar="N", type=int, help="[default: 1]")
@click.option("--decode-workers", metavar="N", type=int, help="[default: 1]")
@click.option("--host", help="Where the router listens.  [default: 127.0.0.1]")
@click.option("--grpc-port", metavar="PORT", type=int, help="0 takes a free one.  [default: 50051]")
@click.option("--http-port", metavar="PORT", type=int, help="0 takes a free one.  [default: 8000]")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="[default: auto]")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), help="[default: auto]")
@click.option("--block-size", metavar="N", type=int, help="Tokens of a KV block.  [default: 16]")
@click.option(
    "--kv-cache-bytes", metavar="N", type=int, help="Bytes of a worker's KV pool  [default: a share of memory]"
)
@click.option("--max-model-len", metavar="N", type=int, help="Most tokens of a sequence  [default: the model's]")
@click.option("--runtime", type=click.Choice(["ray", "process"]), help="What runs the workers.  [default: ray]")
@click.option("--ray-address", metavar="ADDR", help="Join this Ray cluster instead of starting one.")
@click.option("--config", "file", metavar="FILE", help="YAML with all settings; flags override it.")
@click.option("--ready-file", metavar="PATH", help="Written as JSON when the first request can be served.")
@click.pass_context
def serve(context: click.Context, /, file: str | None, **_: Any) -> None:
    """Serve a model until SIGINT or SIGTERM."""
    with _errors_told():
        import asyncio

        from rich.console import Console

        from deploy import settings
        from deploy.progress import Progress
        from deploy.serve import serve as run

        config = settings.load(file, _given_flags(context))
        asyncio.run(run(config, Progress(Console(), Console(stderr=True))))


@main.command()
@click.argument("prompt")
@click.option("--max-tokens", metavar="N", type=int, help="Most tokens to generate.")
@click.option("--temperature", metavar="T", type=float, help="0 is greedy.")
@click.option("--seed", metavar="N", type=int, help="The same seed gives the same text.")
@click.option("--target", metavar="HOST:PORT", default=DEFAULT_TARGET, show_default=True, help="The router.")
def generate(prompt: str, max_tokens: int | None, temperature: float | None, seed: int | None, target: str) -> None:
    """Stream the continuation of PROMPT to stdout, and the time of each stage to stderr."""
    with _errors_told(target):
        from baton.client import Client
        from deploy.report import describe_request

        with Client(target) as client:
            stream = client.stream(prompt, max_tokens=max_tokens, temperature=temperature, seed=seed)
            for delta in stream:
                click.echo(delta.text, nl=False)
                if delta.usage is not None and delta.timings is not None:
                    click.echo()
                    click.echo(describe_request(delta.usage, delta.timings), err=True)


@main.command()
@click.option("--target", metavar="HOST:PORT", default=DEFAULT_TARGET, show_default=True, help="The router.")
def status(target: str) -> None:
    """Show the router and its workers."""
    with _errors_told(target):
        from rich.console import Console

        from baton.client import Client
        from deploy.report import status_table

        with Client(target) as client:
            Console().print(status_table(client.status()))


def _given_flags(context: click.Context) -> dict[str, Any]:
    """The flags that set a value of the config and were given, with their values."""
    from deploy.settings import FLAGS

    options = {
        parameter.opts[0]: context.params[parameter.name] for parameter in context.command.params if parameter.name
    }
    return {flag: options[flag] for flag in FLAGS if options[flag] is not None}


@contextlib.contextmanager
def _errors_told(target: str = "") -> Iterator[None]:
    """Turns what can go wrong into one line and an exit code."""
    from baton.errors import BatonError, InvalidRequestError, UnavailableError
    from deploy.errors import ServeError

    try:
        yield
    except ServeError as error:
        _fail(str(error), error.exit_code)
    except UnavailableError as error:
        _fail(f"{target}: {error} (is `baton serve` running there?)", 1)
    except BatonError as error:
        _fail(str(error), 2 if isinstance(error, InvalidRequestError) else 1)
    except KeyboardInterrupt:
        raise SystemExit(EXIT_INTERRUPTED) from None


def _fail(message: str, exit_code: int) -> None:
    click.echo(f"error: {message}", err=True)
    raise SystemExit(exit_code)


if __name__ == "__main__":
    main()
