"""What validation found wrong, in plain words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pydantic

from deploy.settings import schema
from deploy.settings.setting import Setting

_WORDS: Mapping[str, str] = {
    "greater_than": "must be above {gt:.10g}",
    "greater_than_equal": "must be at least {ge:.10g}",
    "less_than": "must be below {lt:.10g}",
    "less_than_equal": "must be at most {le:.10g}",
    "literal_error": "must be {expected}",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing_size": "is too large",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "string_too_long": "must have at most {max_length} characters",
    "string_too_short": "must have at least {min_length} characters",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "dict_type": "must be names and values",
    "missing": "is required",
    "extra_forbidden": "unknown name",
    "value_error": "{error}",
}


def describe(error: pydantic.ValidationError, settings: Mapping[schema.Path, Setting]) -> str:
    """One line for each problem: where the value was set, the value, and what it must be."""
    return "\n".join(_line(problem, settings) for problem in error.errors())


def _line(problem: Any, settings: Mapping[schema.Path, Setting]) -> str:
    loc: tuple[str | int, ...] = problem["loc"]
    text = _text(problem)
    for length in range(len(loc), 0, -1):
        path = tuple(str(part) for part in loc[:length])
        if path in settings:
            inside = "".join(f"[{part!r}]" for part in loc[length:])
            return f"{settings[path]}{inside and f': item {inside}'}: {text}"
    place = ".".join(str(part) for part in loc)
    # A section's values do not go together: the text names them.
    named = [str(setting) for setting in _named(loc, text, settings)]
    return f"{place}.{text}" + (f" (set by {', '.join(named)})" if named else "") if place else text


def _text(problem: Any) -> str:
    context = problem.get("ctx", {})
    value = schema.values().get(problem["loc"])
    if problem["type"] == "greater_than" and context.get("gt") == 0 and value is not None and value.kind == "integer":
        return "must be at least 1"
    template = _WORDS.get(problem["type"])
    if template is None:
        message = str(problem["msg"])
        return message[:1].lower() + message[1:]
    return template.format(**context).replace("'", "")


def _named(loc: tuple[str | int, ...], text: str, settings: Mapping[schema.Path, Setting]) -> Iterable[Setting]:
    words = set(text.replace(":", " ").replace(",", " ").split())
    for path, setting in settings.items():
        if path[: len(loc)] == loc and path[-1] in words:
            yield setting
