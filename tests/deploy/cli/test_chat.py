"""`baton chat` in a terminal and through pipes."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from click.testing import CliRunner, Result

from deploy.cli import commands
from tests.deploy.cli.fake_openai import FakeOpenAI, openai_server
from tests.deploy.cli.terminal import Terminal


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    with openai_server() as fake:
        yield fake


def pipe(server: FakeOpenAI, text: str, *flags: str, key: str = "") -> Result:
    return CliRunner().invoke(
        commands.main, ["chat", "--url", server.url, *flags], input=text, env={"BATON_API_KEY": key}
    )


def messages(server: FakeOpenAI, index: int) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in server.requests[index]["messages"]]


class TestPipes:
    def test_each_line_is_a_turn_and_only_answers_go_to_stdout(self, server: FakeOpenAI) -> None:
        server.answers = [["Hel", "lo."], ["Bye."]]
        result = pipe(server, "hi\n\nbye\n", "--system", "Be brief.", "--max-tokens", "5", key="sesame")
        assert (result.exit_code, result.stdout, result.stderr) == (0, "Hello.\nBye.\n", "")
        first, second = server.requests
        assert first.items() >= {"model": "demo", "stream": True, "max_tokens": 5, "key": "Bearer sesame"}.items()
        assert "temperature" not in first
        assert messages(server, 0) == [("system", "Be brief."), ("user", "hi")]
        assert messages(server, 1)[2:] == [("assistant", "Hello."), ("user", "bye")]
        assert second["key"] == "Bearer sesame"

    def test_commands_change_the_conversation(self, server: FakeOpenAI) -> None:
        server.answers = [["1"], ["2"]]
        result = pipe(server, "one\n/reset\n/system Rhyme.\ntwo\n/nonsense\n/exit\nthree\n")
        assert (result.exit_code, result.stdout) == (0, "1\n2\n")
        assert messages(server, 1) == [("system", "Rhyme."), ("user", "two")]
        assert "/nonsense is no command" in result.stderr

    def test_a_refusal_is_said_and_ends_it(self, server: FakeOpenAI) -> None:
        server.answers = [(400, "messages: too long")]
        result = pipe(server, "hi\nthere\n")
        assert (result.exit_code, result.stderr) == (1, "error: HTTP 400: messages: too long\n")
        assert len(server.requests) == 1

    def test_nobody_there_is_said_in_one_line(self) -> None:
        result = CliRunner().invoke(commands.main, ["chat", "--url", "http://127.0.0.1:1"], input="hi\n")
        assert result.exit_code == 1
        assert "is `baton serve` running there?" in result.stderr

    def test_an_url_that_is_none_is_the_users_to_mend(self) -> None:
        result = CliRunner().invoke(commands.main, ["chat", "--url", "ftp://host"], input="hi\n")
        assert (result.exit_code, result.stderr) == (2, "error: url: 'ftp://host' is not http://HOST:PORT\n")


def test_a_conversation_in_a_terminal(server: FakeOpenAI) -> None:
    command = [sys.executable, "-P", "-m", "deploy.cli", "chat", "--url", server.url]
    with Terminal(command) as terminal:
        assert f"demo at {server.url}; /help lists the commands" in terminal.read_until("> ")

        server.answers.append(["Hello", " you."])
        terminal.write("hi\n")
        assert "Hello you.\n" in terminal.read_until("\n> ")

        # Ctrl-C stops the answer; what was said stays in the conversation.
        server.endless = True
        server.answers.append(["One, two, "])
        terminal.write("count\n")
        terminal.read_until("One, two, ")
        terminal.interrupt()
        assert "(stopped)" in terminal.read_until("> ")
        assert server.hung_up.wait(10)
        server.endless = False

        # An error ends the answer, not the conversation.
        server.answers.append((503, "no workers"))
        terminal.write("go on\n")
        assert "error: HTTP 503: no workers" in terminal.read_until("> ")

        server.answers.append(["Three."])
        terminal.write("and \\\n")
        terminal.read_until(". ")
        terminal.write("then?\n")
        terminal.read_until("Three.\n> ")
        assert messages(server, 3) == [
            ("user", "hi"),
            ("assistant", "Hello you."),
            ("user", "count"),
            ("assistant", "One, two, "),
            ("user", "and \nthen?"),
        ]

        # Ctrl-C gives up what was typed, Ctrl-D leaves.
        terminal.write("unfinished")
        terminal.read_until("unfinished")
        terminal.interrupt_until("> ")
        terminal.write("\x04")
        assert terminal.wait() == 0
    assert len(server.requests) == 4
