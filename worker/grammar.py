"""Compiling a request's grammar while the engine goes on, before the request reaches it. Used by both services."""

from __future__ import annotations

from baton.grammar import in_time
from baton.requests import RequestSpec
from engine.grammar import CompiledGrammar, Grammars


async def compiled_grammar(grammars: Grammars, spec: RequestSpec) -> CompiledGrammar | None:
    """The grammar of a request; None without one.

    Raises:
        InvalidRequestError: it is not valid, or takes too long.
    """
    if spec.sampling.grammar is None:
        return None
    return await in_time(grammars.compile(spec.sampling.grammar))
