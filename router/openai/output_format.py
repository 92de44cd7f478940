"""What an answer must look like: `response_format`, and vLLM's guided decoding under its newer and older names."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Annotated, Any

import pydantic

from baton.v1 import inference_pb2
from router.openai.errors import ApiError, refused

JsonObject = dict[str, Any]
# Of every list of a request: longer ones are mistakes, and the first wrong element is the last that is looked at, since
# pydantic would describe each of millions.
MANY = pydantic.Field(fail_fast=True, max_length=65536)

_GRAMMARS = "is not served; use a schema, a regular expression, a choice or a grammar"


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


class JsonSchemaFormat(_Part):
    """`response_format.json_schema`. The schema is followed whether `strict` is set or not."""

    # `schema` is a method of pydantic's models.
    json_schema: JsonObject | None = pydantic.Field(None, alias="schema")
    name: str | None = None
    strict: bool | None = None


class ResponseFormat(_Part):
    """`response_format`."""

    type: str
    json_schema: JsonSchemaFormat | None = None

    def grammar(self) -> inference_pb2.Grammar | None:
        """None where any text will do."""
        match self.type:
            case "text":
                return None
            case "json_object":
                return inference_pb2.Grammar(json_object=True)
            case "json_schema":
                if self.json_schema is None or self.json_schema.json_schema is None:
                    raise refused("response_format.json_schema.schema", "is required", "missing_required_parameter")
                schema = self.json_schema.json_schema
                return _schema_grammar("response_format.json_schema.schema", schema)
            case "structural_tag":
                raise refused("response_format.type", f"'structural_tag' {_GRAMMARS}", "unsupported_parameter")
        problem = f"must be 'text', 'json_object' or 'json_schema', got {self.type[:50]!r}"
        raise refused("response_format.type", problem)


class StructuredOutputs(_Part):
    """`structured_outputs`: at most one of its constraints."""

    json_schema: Any = pydantic.Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], MANY] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OutputFields:
    """The fields of a request, of which at most one may constrain the answer."""

    response_format: ResponseFormat | None
    structured_outputs: StructuredOutputs | None
    guided_json: str | JsonObject | None
    guided_regex: str | None
    guided_choice: list[str] | None
    guided_grammar: str | None

    def grammar(self) -> tuple[str, inference_pb2.Grammar] | None:
        """The field that says what the answer must match, and that; None where any answer will do.

        ApiError where two fields say so, or one says it wrongly.
        """
        given = self._given()
        if len(given) > 1:
            first, second = list(given)[:2]
            raise refused(second, f"cannot go with {first}: an answer follows one of them")
        return next(iter(given.items()), None)

    def _given(self) -> dict[str, inference_pb2.Grammar]:
        grammars: dict[str, inference_pb2.Grammar | None] = {
            "response_format": self.response_format.grammar() if self.response_format else None,
            **_constraints("guided_", self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar),
        }
        if (structured := self.structured_outputs) is not None:
            if structured.structural_tag is not None:
                raise refused("structured_outputs.structural_tag", _GRAMMARS, "unsupported_parameter")
            grammars |= _constraints(
                "structured_outputs.",
                structured.json_schema,
                structured.regex,
                structured.choice,
                structured.grammar,
            )
            if structured.json_object:
                grammars["structured_outputs.json_object"] = inference_pb2.Grammar(json_object=True)
        return {field: grammar for field, grammar in grammars.items() if grammar is not None}


def _constraints(
    prefix: str, schema: Any, regex: str | None, choice: list[str] | None, grammar: str | None
) -> Mapping[str, inference_pb2.Grammar | None]:
    alternatives = None if choice is None else inference_pb2.Grammar(choice=inference_pb2.Alternatives(texts=choice))
    return {
        f"{prefix}json": None if schema is None else _schema_grammar(f"{prefix}json", schema),
        f"{prefix}regex": None if regex is None else inference_pb2.Grammar(regex=regex),
        f"{prefix}choice": alternatives,
        f"{prefix}grammar": None if grammar is None else inference_pb2.Grammar(lark=grammar),
    }


def _schema_grammar(field: str, schema: Any) -> inference_pb2.Grammar:
    """A schema may come as text; whether it is one is found out where it is compiled."""
    if isinstance(schema, str):
        return inference_pb2.Grammar(json_schema=schema)
    if not isinstance(schema, dict):
        raise refused(field, "must be a JSON schema, as an object or as a string", "invalid_type")
    try:
        return inference_pb2.Grammar(json_schema=json.dumps(schema, ensure_ascii=False, allow_nan=False))
    except ValueError:
        raise _not_finite(field) from None


def _not_finite(field: str) -> ApiError:
    return refused(field, "has a number that is not finite")
