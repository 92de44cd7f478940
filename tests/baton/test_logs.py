"""One record is one line, for people or for collectors, and says which request it is about."""

from __future__ import annotations

import contextvars
import json
import logging
import subprocess
import sys
from typing import Any

from baton import logs
from baton.logs import JsonFormatter, RequestFormatter, RequestName

NAME = RequestName("7c9e", 2, request_id="chat-7", trace_id="0af7")


def record(message: str, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("router.pipeline", logging.WARNING, __file__, 1, message, (), None)
    made.created = 1700000000.5
    vars(made).update(fields)
    return made


def human(message: str, worker: str = "", **fields: object) -> str:
    return RequestFormatter(worker).format(record(message, **fields))


def as_json(message: str, **fields: object) -> dict[str, Any]:
    line = JsonFormatter("decode", "decode-0").format(record(message, **fields))
    assert "\n" not in line
    parsed: dict[str, Any] = json.loads(line)
    return parsed


def raised() -> Any:
    try:
        raise KeyError("lost")
    except KeyError:
        return sys.exc_info()


class TestHuman:
    def test_a_line_names_the_request_it_is_about(self) -> None:
        assert human("trying again", request=NAME).endswith("WARNING router.pipeline [chat-7 (7c9e/2)] trying again")

    def test_workers_know_only_their_own_name_for_it(self) -> None:
        assert human("gone", request=RequestName("7c9e", 2)).endswith("[7c9e/2] gone")

    def test_a_line_about_no_request_has_no_brackets(self) -> None:
        assert human("joined").endswith("WARNING router.pipeline joined")

    def test_a_worker_is_named(self) -> None:
        assert human("loaded", worker="decode-0").endswith("WARNING decode-0 router.pipeline loaded")

    def test_a_traceback_follows_the_line(self) -> None:
        line = human("unexpected", exc_info=raised())
        assert line.splitlines()[0].endswith("unexpected")
        assert line.splitlines()[-1] == "KeyError: 'lost'"

    def test_what_a_client_sends_stays_in_its_line(self) -> None:
        name = RequestName("7c9e", 2, request_id="a\nb\x1b[2J")
        line = human("lost\r\n\u2028it", request=name, exc_info=(ValueError, ValueError("x\x1b[0m"), None))
        first, *rest = line.splitlines()
        assert first.endswith(r"[a\nb\x1b[2J (7c9e/2)] lost\r\n\u2028it")
        assert rest == [r"ValueError: x\x1b[0m"]


class TestJson:
    def test_a_line_is_an_object(self) -> None:
        assert as_json("trying\nagain", request=NAME) == {
            "time": "2023-11-14T22:13:20.500Z",
            "level": "warning",
            "logger": "router.pipeline",
            "message": "trying\nagain",
            "role": "decode",
            "worker": "decode-0",
            "request_id": "chat-7",
            "internal_id": "7c9e",
            "attempt": 2,
            "trace_id": "0af7",
        }

    def test_what_does_not_apply_is_left_out(self) -> None:
        assert "request_id" not in as_json("joined")
        assert "worker" not in json.loads(JsonFormatter("router").format(record("joined")))

    def test_an_exception_is_part_of_the_object(self) -> None:
        exception = as_json("unexpected", exc_info=raised())["exception"]
        assert (exception["type"], exception["message"]) == ("KeyError", "'lost'")
        assert exception["stack"].endswith("KeyError: 'lost'\n")


def test_lines_of_a_task_are_about_the_request_that_it_named() -> None:
    def serve() -> tuple[str, str]:
        logs.about("chat-8")
        return human("slow"), human("other", request=NAME)

    own, other = contextvars.copy_context().run(serve)
    assert "[chat-8] slow" in own
    assert "[chat-7 (7c9e/2)] other" in other
    assert "[" not in human("later")


def test_a_process_logs_libraries_and_the_uncaught_in_the_same_way() -> None:
    code = """
import logging, warnings
from baton import logs
from baton.config import LogConfig

logs.configure(LogConfig(level="debug", format="json"), role="router")
logging.getLogger("router.pipeline").debug("ours")
logging.getLogger("numba.core").debug("chatter")
logging.getLogger("uvicorn.error").warning("theirs")
warnings.warn("old", DeprecationWarning, stacklevel=1)
raise RuntimeError("boom")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [(line["logger"], line["level"], line["role"]) for line in lines] == [
        ("router.pipeline", "debug", "router"),
        ("uvicorn.error", "warning", "router"),
        ("py.warnings", "warning", "router"),
        ("baton.logs", "critical", "router"),
    ]
    assert lines[-1]["exception"]["message"] == "boom"
