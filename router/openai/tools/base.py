"""What a parser of tool calls takes and gives: the seam between the formats of models and the OpenAI API."""

from __future__ import annotations

import dataclasses
import secrets
import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from router.openai.tools.grammar import GrammarBuilder

_ALPHABET = string.ascii_letters + string.digits


@dataclasses.dataclass(frozen=True, slots=True)
class Tool:
    """One function that the model may call.

    Attributes:
        parameters: JSON schema of the arguments; any object where the client gave none.
    """

    name: str
    parameters: Mapping[str, Any]

    @property
    def properties(self) -> Mapping[str, Any]:
        """The schema of each argument that the client described."""
        properties = self.parameters.get("properties")
        return properties if isinstance(properties, Mapping) else {}


@dataclasses.dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of one call.

    Attributes:
        index: which call of the answer, from 0.
        id: of the call, in its first piece only.
        name: of the function, in the first piece only.
        arguments: what follows in the JSON text of the arguments.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class ParsedDelta:
    """What some text of the model means; empty where it must be held back."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


class ToolParser(Protocol):
    """Finds the calls in one choice's text as it comes.

    The deltas add up to the same result however the text is cut, so one parser serves streams and whole answers. Never
    raises for what a model writes: text that is no call is content. The arguments of a call that ends are valid JSON;
    those of one that breaks off (the length is reached, or what follows is no JSON) stay incomplete, so that no client
    runs a tool with half of what was meant. Belongs to the choice's own task.

    Attributes:
        needs_special_tokens: the format is told by tokens that checkpoints mark as special; the text must have them.
    """

    needs_special_tokens: ClassVar[bool]

    def __init__(self, tools: Sequence[Tool]) -> None: ...

    def feed(self, text: str) -> ParsedDelta:
        """Takes the next piece of the text."""
        ...

    def finish(self) -> ParsedDelta:
        """What was held back, where the text ends here. Called once, last."""
        ...

    @classmethod
    def grammar(cls, builder: GrammarBuilder, tools: Sequence[Tool], *, parallel: bool) -> str:
        """The body of a Lark rule for what this parser reads as calls of these tools, one or (parallel) more.

        Raises:
            InvalidRequestError: the format cannot express a tool's schema.
        """
        ...


def read_tools(tools: Sequence[Any] | None) -> list[Tool]:
    """From OpenAI's `tools`; entries that are not functions are left out."""
    found = []
    for entry in tools or ():
        function = entry.get("function") if isinstance(entry, Mapping) else None
        if isinstance(function, Mapping) and isinstance(name := function.get("name"), str):
            parameters = function.get("parameters")
            found.append(Tool(name, parameters if isinstance(parameters, Mapping) and parameters else {}))
    return found


def random_id(length: int) -> str:
    """Letters and digits that nobody can guess."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))
