"""`baton generate`: one prompt, streamed to stdout as text or printed as one JSON object."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import click

from baton.client import Client, Completion, FinishReason
from deploy.cli.report import describe_request


def generate(client: Client, prompt: str, *, as_json: bool, **sampling: Any) -> None:
    """Asks the router and prints the answer.

    Raises:
        BatonError: whatever ended the request.
    """
    if as_json:
        click.echo(json.dumps(as_dict(client.generate(prompt, **sampling)), ensure_ascii=False))
        return
    for delta in client.stream(prompt, **sampling):
        click.echo(delta.text, nl=False)
        if delta.usage is not None and delta.timings is not None:
            click.echo()
            click.echo(describe_request(delta.usage, delta.timings), err=True)


def as_dict(completion: Completion) -> dict[str, Any]:
    """The object that `--json` prints: request_id, text, finish_reason, token_ids, usage and timings in seconds."""
    choice = completion.choices[0]
    return {
        "request_id": completion.request_id,
        "text": choice.text,
        "finish_reason": "stop" if choice.finish_reason is FinishReason.STOP else "length",
        "token_ids": list(choice.token_ids),
        "usage": dataclasses.asdict(completion.usage),
        "timings": dataclasses.asdict(completion.timings),
    }
