"""The flags of a load, for every command that makes one: whom to ask, what to send, what to hold it to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click

from bench.load import traces
from bench.load.load import Load
from bench.load.measures import Objectives
from bench.load.targets import Target, open_target
from bench.load.traces import Replay
from bench.load.workloads import Lengths

Command = TypeVar("Command", bound=Callable[..., Any])


class LengthsType(click.ParamType[Lengths]):
    """A number of tokens, or N:MAX."""

    name = "N[:MAX]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Lengths:
        try:
            return value if isinstance(value, Lengths) else Lengths.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


_COUNT = click.IntRange(min=1)
_POSITIVE = click.FloatRange(min=0, min_open=True)
_SECONDS = click.FloatRange(min=0)


_TARGET = (
    click.option(
        "--target",
        metavar="ADDRESS",
        envvar="BATON_URL",
        default="http://127.0.0.1:8000",
        show_default=True,
        help="http://… or https://… for OpenAI's API, grpc://HOST:PORT or HOST:PORT for Baton's.",
    ),
    click.option(
        "--api",
        type=click.Choice(["completions", "chat"]),
        default="completions",
        show_default=True,
        help="What is asked over HTTP: completions of token ids, or chats, with a word for each token.",
    ),
    click.option("--model", metavar="NAME", help="The served model  [default: the only one]"),
    click.option("--api-key", metavar="KEY", envvar="BATON_API_KEY", help="Sent with every request."),
    click.option(
        "--tls-ca",
        metavar="FILE",
        envvar="BATON_TLS_CA",
        type=click.Path(exists=True, dir_okay=False),
        help="Trust the authorities in this PEM file; gRPC then connects with TLS.",
    ),
    click.option(
        "--continuous-usage",
        is_flag=True,
        help="Ask an HTTP server for a token count in every event, where it puts several tokens into one.",
    ),
)

_LOAD = (
    click.option(
        "--workload",
        type=click.Choice(["random", "shared-prefix", "multi-turn", *traces.READERS]),
        default="random",
        show_default=True,
        help="What the requests are; mooncake and azure replay --trace.",
    ),
    click.option(
        "--trace",
        metavar="FILE",
        type=click.Path(exists=True, dir_okay=False),
        help="A trace: JSON lines of Mooncake, CSV of Azure.",
    ),
    click.option(
        "--input-tokens",
        type=LengthsType(),
        metavar="N[:MAX]",
        default="256",
        show_default=True,
        help="New tokens of each prompt; N:MAX draws evenly between them.",
    ),
    click.option(
        "--output-tokens",
        type=LengthsType(),
        metavar="N[:MAX]",
        default="64",
        show_default=True,
        help="Tokens of each answer.",
    ),
    click.option(
        "--num-requests",
        metavar="N",
        type=_COUNT,
        help="Requests, conversations or rows of a trace  [default: 100, all rows of a trace]",
    ),
    click.option(
        "--groups",
        "num_groups",
        metavar="N",
        type=_COUNT,
        default=8,
        show_default=True,
        help="shared-prefix: how many different prefixes.",
    ),
    click.option(
        "--prefix-tokens",
        metavar="N",
        type=_COUNT,
        default=256,
        show_default=True,
        help="shared-prefix: tokens of each prefix, before those of --input-tokens.",
    ),
    click.option(
        "--turns",
        "num_turns",
        metavar="N",
        type=_COUNT,
        default=4,
        show_default=True,
        help="multi-turn: questions of each conversation.",
    ),
    click.option(
        "--think-s",
        metavar="SECONDS",
        type=_SECONDS,
        default=0.0,
        show_default=True,
        help="multi-turn: from an answer to the next question.",
    ),
    click.option(
        "--start-s",
        metavar="SECONDS",
        type=_SECONDS,
        default=0.0,
        show_default=True,
        help="Traces: where to begin, in the trace's own time.",
    ),
    click.option("--end-s", metavar="SECONDS", type=_POSITIVE, help="Traces: where to end."),
    click.option(
        "--time-scale",
        metavar="X",
        type=_POSITIVE,
        default=1.0,
        show_default=True,
        help="Traces: what the gaps are multiplied with; 0.5 is twice the load.",
    ),
    click.option(
        "--length-scale",
        metavar="X",
        type=_POSITIVE,
        default=1.0,
        show_default=True,
        help="Traces: what lengths are multiplied with; prefixes stay shared.",
    ),
    click.option("--max-input-tokens", metavar="N", type=_COUNT, help="Traces: longer prompts are cut."),
    click.option("--max-output-tokens", metavar="N", type=_COUNT, help="Traces: longer answers are cut."),
    click.option(
        "--rate",
        metavar="X",
        type=_POSITIVE,
        help="Open loop: requests per second, inf for all at once; of a trace, instead of its own times.",
    ),
    click.option(
        "--burstiness",
        metavar="X",
        type=_POSITIVE,
        default=1.0,
        show_default=True,
        help="With --rate: 1 is a Poisson process, less is burstier, more is more even, inf a fixed interval.",
    ),
    click.option(
        "--concurrency",
        metavar="N",
        type=_COUNT,
        help="Most requests under way; without --rate the closed loop: each answer makes room for a request.",
    ),
    click.option(
        "--warm-up",
        "num_warm_up",
        metavar="N",
        type=click.IntRange(min=0),
        default=2,
        show_default=True,
        help="Requests that are sent before, and not measured.",
    ),
    click.option(
        "--vocab-size",
        metavar="N",
        type=click.IntRange(min=2),
        help="Token ids of prompts are below this  [default: the model's over gRPC, else 1000]",
    ),
    click.option(
        "--seed",
        metavar="N",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="The same seed sends the same requests at the same times.",
    ),
)

_OBJECTIVES = (
    click.option(
        "--slo-ttft-ms", metavar="MS", type=_POSITIVE, help="Goodput counts requests with a first token in this time."
    ),
    click.option(
        "--slo-tpot-ms", metavar="MS", type=_POSITIVE, help="Goodput counts requests with at most this per token."
    ),
)


def target_options(command: Command) -> Command:
    """Adds the flags that `make_target` reads."""
    return _add(_TARGET, command)


def load_options(command: Command) -> Command:
    """Adds the flags that `make_load` reads."""
    return _add(_LOAD, command)


def objective_options(command: Command) -> Command:
    """Adds the flags that `make_objectives` reads."""
    return _add(_OBJECTIVES, command)


def make_target(options: Mapping[str, Any]) -> Target:
    """The target of a command's parameters; called on the event loop that uses it.

    Raises:
        ValueError: the address is none.
    """
    names = ("api", "model", "api_key", "tls_ca", "continuous_usage")
    return open_target(options["target"], **{name: options[name] for name in names})


def make_load(options: Mapping[str, Any]) -> Load:
    """The load of a command's parameters.

    Raises:
        ValueError: options do not go together.
    """
    replay = Replay(**{name: options[name] for name in _names_of(Replay) & set(options)})
    load = {name: options[name] for name in _names_of(Load) & set(options)}
    return Load(**load, replay=replay)


def make_objectives(options: Mapping[str, Any]) -> Objectives | None:
    """The objectives of a command's parameters; None where none is given."""
    ttft_ms, tpot_ms = options["slo_ttft_ms"], options["slo_tpot_ms"]
    if ttft_ms is None and tpot_ms is None:
        return None
    return Objectives(None if ttft_ms is None else ttft_ms / 1e3, None if tpot_ms is None else tpot_ms / 1e3)


def _add(options: Sequence[Callable[[Command], Command]], command: Command) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


def _names_of(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}
