from __future__ import annotations

import json
import threading

import pytest

from baton.errors import InternalError, InvalidRequestError, UnavailableError
from baton.grammar import GrammarThreads, check_grammar, in_time
from baton.requests import Grammar, GrammarKind


def grammar(kind: str, *texts: str) -> Grammar:
    return Grammar(GrammarKind(kind), texts)


@pytest.mark.parametrize(
    "good",
    [
        grammar("json_object"),
        grammar("json_schema", '{"type": "object", "properties": {"a": {"type": "integer"}}}'),
        grammar("json_schema", "{}"),
        grammar("regex", r"[a-z]+\d{2,3}"),
        grammar("choice", 'yes "quoted"', "nö\n"),
        grammar("choice", "same", "same"),
        grammar("lark", 'start: "a" b\nb: "b"+'),
    ],
)
def test_a_valid_grammar_is_accepted(good: Grammar) -> None:
    check_grammar(good)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (grammar("json_schema", '{"type":'), "sampling.grammar.json_schema: is not JSON: Expecting value"),
        (grammar("json_schema", "[1]"), "sampling.grammar.json_schema: must be a JSON object"),
        (grammar("json_schema", '{"type": 3}'), "sampling.grammar.json_schema: type must be a string"),
        (grammar("json_schema", '{"a":' * 4000 + "1" + "}" * 4000), "sampling.grammar.json_schema: is nested too deep"),
        (grammar("json_schema", '{"a":' * 300 + "1" + "}" * 300), "sampling.grammar.json_schema: recursion limit"),
        (grammar("json_schema", '{"$ref": "http://127.0.0.1/x"}'), "sampling.grammar.json_schema: Resource"),
        (grammar("regex", "(a"), "sampling.grammar.regex: .* unclosed group"),
        (grammar("regex", ""), "sampling.grammar.regex: is empty"),
        (grammar("choice"), "sampling.grammar.choice: must have at least one text"),
        (grammar("choice", "a", ""), "sampling.grammar.choice: .* none that is empty"),
        (grammar("lark", "start: x"), 'sampling.grammar.lark: .* unknown name: "x"'),
    ],
)
def test_an_invalid_grammar_is_refused_with_what_is_wrong(bad: Grammar, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        check_grammar(bad)
    # Details travel in a call's trailers.
    assert len(caught.value.message) < 400


@pytest.fixture
def threads() -> GrammarThreads:
    return GrammarThreads(1)


@pytest.mark.parametrize(
    "deep",
    [
        grammar("lark", "start: a0\n" + "\n".join(f'a{i}:"x" a{i + 1}' for i in range(4000)) + '\na4000: "y"'),
        grammar(
            "json_schema",
            json.dumps(
                {
                    "$ref": "#/$defs/0",
                    "$defs": {**{str(i): {"items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(1500)}, "1500": {}},
                }
            ),
        ),
    ],
)
async def test_rules_that_lead_far_do_not_overflow_the_stack(deep: Grammar, threads: GrammarThreads) -> None:
    assert deep.num_bytes <= 70_000
    await in_time(threads.submit(check_grammar, deep))
    threads.close()


async def test_errors_reach_whoever_waits(threads: GrammarThreads) -> None:
    with pytest.raises(InvalidRequestError, match="is empty"):
        await in_time(threads.submit(check_grammar, grammar("regex", "")))
    threads.close()


async def test_a_grammar_that_takes_for_ever_is_refused(
    threads: GrammarThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.grammar._TIMEOUT_S", 0.01)
    done = threading.Event()
    with pytest.raises(InvalidRequestError, match=r"was not compiled within 0.01 s"):
        await in_time(threads.submit(lambda _: done.wait(), grammar("regex", "a")))
    done.set()
    threads.close()


class Panic(BaseException):
    """As pyo3's, which is no Exception."""


async def test_a_panic_is_an_internal_error(threads: GrammarThreads) -> None:
    def panic(_: Grammar) -> None:
        raise Panic("called unwrap on None")

    with pytest.raises(InternalError, match="Panic: called unwrap on None"):
        await in_time(threads.submit(panic, grammar("regex", "a")))
    await in_time(threads.submit(check_grammar, grammar("regex", "a")))
    threads.close()


async def test_a_thread_that_a_grammar_keeps_is_replaced(
    threads: GrammarThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr("baton.grammar._TIMEOUT_S", 0.01)
        with pytest.raises(InvalidRequestError):
            await in_time(threads.submit(lambda _: done.wait(), grammar("regex", "a")))
    await in_time(threads.submit(check_grammar, grammar("regex", "a")))
    done.set()
    threads.close()


async def test_no_more_than_a_few_threads_are_replaced(
    threads: GrammarThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.grammar._MAX_LOST_THREADS", 1)
    done = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr("baton.grammar._TIMEOUT_S", 0.01)
        for _ in range(2):
            with pytest.raises(InvalidRequestError):
                await in_time(threads.submit(lambda _: done.wait(), grammar("regex", "a")))
    with monkeypatch.context() as patch:
        patch.setattr("baton.grammar._MAX_WAIT_S", 0.01)
        with pytest.raises(UnavailableError):
            await in_time(threads.submit(check_grammar, grammar("regex", "a")))
    done.set()
    await in_time(threads.submit(check_grammar, grammar("regex", "a")))
    threads.close()
