from __future__ import annotations

import logging
import sys

from baton.logs import RequestFormatter


def format_record(message: str, **fields: object) -> str:
    record = logging.LogRecord("router.pipeline", logging.WARNING, __file__, 1, message, (), None)
    vars(record).update(fields)
    return RequestFormatter().format(record)


def test_a_line_names_the_request_it_is_about() -> None:
    assert format_record("trying again", request="abc/2").endswith("WARNING router.pipeline [abc/2] trying again")


def test_a_line_about_no_request_has_no_brackets() -> None:
    assert format_record("joined").endswith("WARNING router.pipeline joined")


def test_a_traceback_follows_the_line() -> None:
    try:
        raise KeyError("lost")
    except KeyError:
        line = format_record("unexpected", exc_info=sys.exc_info())
    assert line.splitlines()[0].endswith("unexpected")
    assert line.splitlines()[-1] == "KeyError: 'lost'"
