"""`make run`: a cluster on the demo model, four streamed answers with the time of each stage, and nothing left over."""

from __future__ import annotations

import pathlib

import click
from rich.console import Console
from rich.text import Text

from baton.client import Client
from deploy.cli.report import describe_request, status_table
from deploy.demo import prompts
from deploy.environment import quiet_grpc
from deploy.errors import ClusterError
from deploy.local_cluster import LocalCluster

MODEL = pathlib.Path(__file__).parent / "demo" / "model"
NUM_PAIRS = 24
LONGEST_SHOWN = 240


class Tour:
    """Asks a running cluster and shows what comes."""

    def __init__(self, client: Client, console: Console) -> None:
        self._client = client
        self._console = console

    def ask(self, title: str, prompt: str, *, max_tokens: int = 16) -> str:
        """Streams one answer, greedily, and returns it."""
        shown = prompt if len(prompt) <= LONGEST_SHOWN else f"{prompt[: LONGEST_SHOWN // 2]} ... {prompt[-40:]}"
        self._console.print()
        self._console.rule(title, align="left")
        self._console.print(Text(shown, "dim"), end="", soft_wrap=True)
        answer = ""
        for delta in self._client.stream(prompt, max_tokens=max_tokens, temperature=0):
            answer += delta.text
            self._console.print(Text(delta.text, "bold cyan"), end="", soft_wrap=True)
            if delta.usage is not None and delta.timings is not None:
                self._console.print()
                self._console.print(Text(describe_request(delta.usage, delta.timings), "green"), soft_wrap=True)
        return answer

    def check(self, answer: str, expected: str) -> None:
        """Shows whether an answer is right."""
        right = prompts.clean(answer) == expected
        self._console.print(Text("right" if right else f"wrong: expected {expected}", "green" if right else "red"))

    def run(self) -> None:
        """The whole tour."""
        self.ask("A story", prompts.STORY, max_tokens=120)
        self.check(self.ask("A sum", prompts.ARITHMETIC), prompts.ARITHMETIC_ANSWER)
        prompt, expected = prompts.recall_prompt(NUM_PAIRS)
        answer = self.ask("A long prompt: prefilled on one worker, decoded on another", prompt)
        self.check(answer, expected)
        prompt, expected = prompts.follow_up(prompt, answer)
        self.check(self.ask("The next turn: its beginning is in the prefix cache", prompt), expected)
        self._console.print()
        self._console.print(status_table(self._client.status()))


@click.command()
@click.option("--runtime", type=click.Choice(["ray", "process"]), default="ray", show_default=True)
def main(runtime: str) -> None:
    """Show Baton at work on the demo model."""
    quiet_grpc()
    console = Console()
    cluster = LocalCluster(MODEL, "--served-model-name", "demo", "--runtime", runtime)
    cluster.start()
    try:
        cluster.wait_ready()
        with Client(cluster.target) as client:
            Tour(client, console).run()
    except ClusterError as error:
        raise click.ClickException(str(error)) from error
    finally:
        exit_code = cluster.stop()
    if exit_code:
        raise click.ClickException(f"baton serve ended with exit status {exit_code}")


if __name__ == "__main__":
    main()
