from __future__ import annotations

import asyncio
import threading

import pytest

from baton import grammar as baton_grammar
from baton.errors import InvalidRequestError, UnavailableError
from baton.requests import Grammar, GrammarKind
from router.grammar import GrammarCheck


async def test_a_grammar_that_was_valid_is_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Grammar] = []

    def check_and_note(grammar: Grammar) -> None:
        checked.append(grammar)
        baton_grammar.check_grammar(grammar)

    monkeypatch.setattr("router.grammar.check_grammar", check_and_note)
    now = 0.0
    check = GrammarCheck(lambda: now)
    good, bad = Grammar(GrammarKind.REGEX, ("a+",)), Grammar(GrammarKind.REGEX, ("(a",))
    for _ in range(3):
        await check.check(good)
        with pytest.raises(InvalidRequestError, match=r"^sampling.grammar.regex: \S"):
            await check.check(bad)
    assert checked == [good, bad]
    now += 1000.0
    await check.check(good)
    with pytest.raises(InvalidRequestError):
        await check.check(bad)
    assert checked == [good, bad, bad]
    check.close()


class Gated:
    """Checks that begin at once and end when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.checked: list[Grammar] = []
        self.began = threading.Semaphore(0)
        self.gate = threading.Event()
        monkeypatch.setattr("router.grammar.check_grammar", self)

    def __call__(self, grammar: Grammar) -> None:
        self.checked.append(grammar)
        self.began.release()
        self.gate.wait()


FIRST, SECOND = Grammar(GrammarKind.REGEX, ("a",)), Grammar(GrammarKind.REGEX, ("b",))


async def test_equal_grammars_are_checked_once_for_all_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    gated, check = Gated(monkeypatch), GrammarCheck()
    asked = [asyncio.create_task(check.check(FIRST)) for _ in range(3)]
    await asyncio.to_thread(gated.began.acquire)
    asked[0].cancel()
    gated.gate.set()
    assert await asyncio.gather(*asked[1:]) == [None, None]
    assert gated.checked == [FIRST]
    check.close()


async def test_a_grammar_that_nobody_waits_for_any_more_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    gated, check = Gated(monkeypatch), GrammarCheck()
    slow = asyncio.create_task(check.check(FIRST))
    await asyncio.to_thread(gated.began.acquire)
    waiting = asyncio.create_task(check.check(SECOND))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    gated.gate.set()
    await slow
    await check.check(Grammar(GrammarKind.REGEX, ("c",)))
    assert SECOND not in gated.checked
    check.close()


async def test_who_waits_too_long_for_others_may_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.grammar._MAX_WAIT_S", 0.01)
    gated, check = Gated(monkeypatch), GrammarCheck()
    slow = asyncio.create_task(check.check(FIRST))
    await asyncio.to_thread(gated.began.acquire)
    with pytest.raises(UnavailableError, match="try again later"):
        await check.check(SECOND)
    gated.gate.set()
    await slow
    await check.check(SECOND)
    check.close()
