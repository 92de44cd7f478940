"""`baton chat`: a conversation in a terminal, or through pipes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

import click

from baton.errors import BatonError
from deploy.cli.chat_client import ChatClient, Message

HELP = """\
/reset         forget the conversation
/system TEXT   tell the model TEXT before the conversation; without TEXT, nothing
/help          show this
/exit          leave, as Ctrl-D does
A line that ends with \\ goes on in the next. Ctrl-C stops an answer."""
PROMPT = "> "
CONTINUATION = ". "


class Conversation:
    """The messages so far, and what is told to the model before them.

    Attributes:
        system: the system message; empty for none.
    """

    def __init__(self, client: ChatClient, *, model: str, system: str, sampling: Mapping[str, Any]) -> None:
        self._client = client
        self._model = model
        self._sampling = sampling
        self._turns: list[Message] = []
        self.system = system

    @property
    def messages(self) -> list[Message]:
        """What the next question goes after."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self._turns]

    def reset(self) -> None:
        self._turns.clear()

    def ask(self, question: str, write: Callable[[str, bool], None]) -> None:
        """Streams an answer to `write`, which takes text and whether it is reasoning.

        What was answered when an interrupt came stays in the conversation; a question without an answer does not.

        Raises:
            BatonError: there is no answer, or only its beginning.
            KeyboardInterrupt: as it came.
        """
        turn: Message = {"role": "user", "content": question}
        answer = ""
        try:
            with contextlib.closing(
                self._client.stream([*self.messages, turn], model=self._model, **self._sampling)
            ) as pieces:
                for piece in pieces:
                    if not piece.is_reasoning:
                        answer += piece.text
                    write(piece.text, piece.is_reasoning)
        finally:
            if answer:
                self._turns += [turn, {"role": "assistant", "content": answer}]


def run(client: ChatClient, *, system: str | None, model: str | None, sampling: Mapping[str, Any]) -> None:
    """Talks until the input ends.

    Raises:
        BatonError: the server does not answer; in a terminal only at the start.
    """
    model = model or client.model()
    conversation = Conversation(client, model=model, system=system or "", sampling=sampling)
    if sys.stdin.isatty() and sys.stdout.isatty():
        Terminal(conversation).run(f"{model} at {client.url}; /help lists the commands")
    else:
        answer_lines(conversation, sys.stdin)


def answer_lines(conversation: Conversation, lines: TextIO) -> None:
    """Answers each line on stdout; commands work, and what they say goes to stderr."""
    for line in lines:
        message = line.strip()
        if message.startswith("/"):
            if not command(conversation, message, lambda text: click.echo(text, err=True)):
                return
        elif message:
            conversation.ask(message, lambda text, is_reasoning: None if is_reasoning else click.echo(text, nl=False))
            click.echo()


def command(conversation: Conversation, line: str, say: Callable[[str], None]) -> bool:
    """Obeys a line that begins with a slash; False to leave."""
    name, _, argument = line.partition(" ")
    match name:
        case "/exit" | "/quit":
            return False
        case "/reset":
            conversation.reset()
            say("forgotten")
        case "/system":
            conversation.system = argument.strip()
            say("the model is told so" if conversation.system else "the model is told nothing")
        case "/help":
            say(HELP)
        case _:
            say(f"{name} is no command; /help lists them")
    return True


class Terminal:
    """Asks and shows; errors end an answer, not the conversation."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        # Line editing and the history of this conversation, where Python has it.
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401

    def run(self, greeting: str) -> None:
        """Returns when the user leaves."""
        click.secho(greeting, dim=True)
        for message in self._messages():
            if not message.startswith("/"):
                self._answer(message)
            elif not command(self._conversation, message, lambda text: click.secho(text, dim=True)):
                return

    def _messages(self) -> Iterator[str]:
        lines: list[str] = []
        while True:
            try:
                line = input(CONTINUATION if lines else PROMPT)
            except EOFError:
                click.echo()
                return
            except KeyboardInterrupt:
                # As in a shell: what was typed is given up.
                click.echo()
                lines.clear()
                continue
            lines.append(line.removesuffix("\\"))
            if not line.endswith("\\"):
                message = "\n".join(lines).strip()
                lines.clear()
                if message:
                    yield message

    def _answer(self, message: str) -> None:
        try:
            self._conversation.ask(message, lambda text, is_reasoning: click.secho(text, nl=False, dim=is_reasoning))
            click.echo()
        except KeyboardInterrupt:
            click.secho(" (stopped)", dim=True)
        except BatonError as error:
            click.echo()
            click.secho(f"error: {error}", fg="red", err=True)
