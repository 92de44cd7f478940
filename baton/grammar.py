"""Grammars in the terms of llguidance: what the router checks and the engine compiles is made in this one place.

llguidance reads JSON schemas (of which it must know every keyword that constrains), regular expressions and a dialect
of Lark; it fetches nothing from anywhere.
"""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from llguidance import LLMatcher, LLParserLimits

from baton.errors import InternalError, InvalidRequestError, UnavailableError
from baton.requests import Grammar, GrammarKind

FIELD = "sampling.grammar"
_MAX_MESSAGE_CHARS = 300
# llguidance descends into rules that refer to rules: 64 KiB of them overflow the 8 MiB that threads have by default.
# Only what is used is ever taken from memory.
_STACK_BYTES = 256 << 20
# A few grammars that are valid would take minutes.
_TIMEOUT_S = 20.0
# For a free thread.
_MAX_WAIT_S = 20.0
# Threads that go on with a grammar that nobody waits for any more; each was replaced by a fresh one.
_MAX_LOST_THREADS = 4

T = TypeVar("T")
# Between the parts of a JSON text: a blank or two, or a new line and its indentation. Bounded, since small models would
# go on with white space for ever. A schema's own "x-guidance" overrides it.
_WHITE_SPACE = r"[ \t]{1,2}|\r?\n[ \t]{0,32}"


class GrammarThreads:
    """Threads to check and compile grammars in: no other thread's stack is deep enough.

    They start with the first call. A grammar that takes too long keeps its thread, which is replaced, up to a small
    number of times; nobody's exit waits for it.
    """

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._num_started = 0
        self._num_lost = 0
        # Those that take calls, now or after the one that they are at.
        self._num_serving = 0
        self._closed = False
        self._lock = threading.Lock()
        self._calls: queue.SimpleQueue[_Call[Any] | None] = queue.SimpleQueue()

    def submit(self, function: Callable[[Grammar], T], grammar: Grammar) -> Future[T]:
        """Calls `function` with `grammar` in one of the threads, unless the future is cancelled before that begins.

        The future fails with InvalidRequestError where the call takes too long, and with InternalError where a library
        panics.
        """
        call = _Call(function, grammar)
        with self._lock:
            if self._num_serving < self._num_threads:
                self._start()
        self._calls.put(call)
        return call.future

    def close(self) -> None:
        """Ends the threads once they have done what was submitted."""
        with self._lock:
            self._closed = True
            num_serving = self._num_serving
        for _ in range(num_serving):
            self._calls.put(None)

    def _start(self) -> None:
        before = threading.stack_size(_STACK_BYTES)
        try:
            threading.Thread(target=self._run, name=f"grammar-{self._num_started}", daemon=True).start()
        finally:
            threading.stack_size(before)
        self._num_started += 1
        self._num_serving += 1

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            if not call.future.set_running_or_notify_cancel():
                continue
            timer = threading.Timer(_TIMEOUT_S, self._give_up, (call,))
            timer.daemon = True
            timer.start()
            call.run(self._lock)
            timer.cancel()
            if call.is_lost:
                with self._lock:
                    self._num_lost -= 1
                return

    def _give_up(self, call: _Call[Any]) -> None:
        """In a timer's thread."""
        with self._lock:
            if call.is_over:
                return
            call.is_over = True
            if self._num_lost < _MAX_LOST_THREADS and not self._closed:
                call.is_lost = True
                self._num_lost += 1
                self._num_serving -= 1
                self._start()
        problem = f"was not compiled within {_TIMEOUT_S:g} s; simplify it"
        call.future.set_exception(InvalidRequestError(FIELD, problem))


class _Call(Generic[T]):
    """A function to call with a grammar.

    Attributes:
        is_over: the future has its result, or is about to have it.
        is_lost: it took too long, and another thread was started for the one that it holds.
    """

    def __init__(self, function: Callable[[Grammar], T], grammar: Grammar) -> None:
        self.future: Future[T] = Future()
        self.is_over = False
        self.is_lost = False
        self._function = function
        self._grammar = grammar

    def run(self, lock: threading.Lock) -> None:
        """Makes the call; what it gives is the future's result, unless that was given up."""
        error: Exception | None = None
        try:
            result = self._function(self._grammar)
        except Exception as raised:
            error = raised
        except BaseException as raised:
            # As a library in Rust raises where it panics; it would end whoever waits.
            error = InternalError(shortened(f"{type(raised).__name__}: {raised}"))
        with lock:
            if self.is_over:
                return
            self.is_over = True
        if error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


async def in_time(compiled: Future[T]) -> T:
    """What a grammar's thread makes, on an event loop; the thread goes on if this is cancelled, for others who wait.

    Raises:
        InvalidRequestError: the grammar is not valid, or takes too long.
        UnavailableError: all threads are busy with other grammars, and were for long.
    """
    made = asyncio.wrap_future(compiled)
    try:
        async with asyncio.timeout(_MAX_WAIT_S):
            return await asyncio.shield(made)
    except TimeoutError:
        if not compiled.running() and not compiled.done():
            raise UnavailableError(f"grammars of other requests took {_MAX_WAIT_S:g} s; try again later") from None
    # Its own time began when its thread did.
    return await asyncio.shield(made)


def parser_limits() -> LLParserLimits:
    """What one grammar may cost; errors without the parser's state, which is the client's text."""
    return LLParserLimits(verbose_errors=False)


def llguidance_grammar(grammar: Grammar) -> str:
    """The grammar as llguidance takes it.

    Raises:
        InvalidRequestError: a part is missing or not JSON. What llguidance itself refuses shows when it compiles.
    """
    match grammar.kind:
        case GrammarKind.JSON_OBJECT:
            return _from_schema('{"type": "object"}')
        case GrammarKind.JSON_SCHEMA:
            return _from_schema(grammar.texts[0])
        case GrammarKind.REGEX:
            return LLMatcher.grammar_from_regex(_text(grammar))
        case GrammarKind.LARK:
            return LLMatcher.grammar_from_lark(_text(grammar))
        case GrammarKind.CHOICE:
            if not grammar.texts or not all(grammar.texts):
                raise InvalidRequestError(f"{FIELD}.choice", "must have at least one text, and none that is empty")
            return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, dict.fromkeys(grammar.texts))))


def check_grammar(grammar: Grammar) -> None:
    """Refuses what no model's workers could compile. To be called in one of `GrammarThreads`.

    Raises:
        InvalidRequestError: the grammar is not valid; the message says where.
    """
    failed, messages = LLMatcher.validate_grammar_with_warnings(llguidance_grammar(grammar), limits=parser_limits())
    if failed:
        raise invalid_grammar(grammar, messages[0])


def invalid_grammar(grammar: Grammar, problem: str) -> InvalidRequestError:
    """What a client is told of a grammar that llguidance refuses."""
    return InvalidRequestError(f"{FIELD}.{grammar.kind}", shortened(problem))


def shortened(problem: str) -> str:
    """An error of llguidance as one line of bounded length: where it is comes first, and what it is last."""
    line = " ".join(problem.split())
    half = _MAX_MESSAGE_CHARS // 2
    return line if len(line) <= _MAX_MESSAGE_CHARS else f"{line[:half]} ... {line[-half:]}"


def _from_schema(schema: str) -> str:
    try:
        parsed = json.loads(schema)
    except ValueError as error:
        raise InvalidRequestError(f"{FIELD}.json_schema", f"is not JSON: {error}") from error
    except RecursionError:
        raise InvalidRequestError(f"{FIELD}.json_schema", "is nested too deeply") from None
    if not isinstance(parsed, dict):
        raise InvalidRequestError(f"{FIELD}.json_schema", "must be a JSON object")
    try:
        return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": _WHITE_SPACE})
    except ValueError as error:
        raise InvalidRequestError(f"{FIELD}.json_schema", shortened(str(error))) from error


def _text(grammar: Grammar) -> str:
    if not grammar.texts[0]:
        raise InvalidRequestError(f"{FIELD}.{grammar.kind}", "is empty")
    return grammar.texts[0]
