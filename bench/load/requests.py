"""What is sent to a server: one request, or the first of a conversation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from typing_extensions import TypeIs


class Message(TypedDict):
    """One message of a chat."""

    role: str
    content: str


# Token ids, a text, or the messages of a chat.
Prompt = Sequence[int] | str | Sequence[Message]


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """What a user says next in a conversation: token ids after a prompt of token ids, a text after text or messages.

    `think_s` is the time between the end of the answer and this.
    """

    prompt: Sequence[int] | str
    max_tokens: int
    think_s: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class LoadRequest:
    """One request of a load.

    Attributes:
        max_tokens: tokens to generate; the end of sequence does not stop an answer.
        arrival_s: seconds from the start of the run at which it is due; None means as soon as there is room.
        follow_ups: the turns that come after the answer, each with everything before it as its prompt.
    """

    prompt: Prompt
    max_tokens: int
    arrival_s: float | None = None
    follow_ups: tuple[Turn, ...] = ()

    def next_turn(self, *, text: str, token_ids: Sequence[int]) -> LoadRequest:
        """The request that goes on after an answer: its text, or its token ids after a prompt of those."""
        turn, *rest = self.follow_ups
        return LoadRequest(_extended(self.prompt, text, token_ids, turn.prompt), turn.max_tokens, None, tuple(rest))


def _extended(prompt: Prompt, text: str, token_ids: Sequence[int], addition: Sequence[int] | str) -> Prompt:
    if isinstance(prompt, str):
        assert isinstance(addition, str)
        return prompt + text + addition
    if is_chat(prompt):
        assert isinstance(addition, str)
        messages: list[Message] = [{"role": "assistant", "content": text}, {"role": "user", "content": addition}]
        return [*prompt, *messages]
    assert not isinstance(addition, str)
    return [*prompt, *token_ids, *addition]


def is_chat(prompt: Prompt) -> TypeIs[Sequence[Message]]:
    """Whether a prompt is messages."""
    return not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], dict)
