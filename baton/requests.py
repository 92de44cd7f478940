"""Requests and their parts as every process holds them: plain frozen data, free of torch and of the wire.

`baton.wire` converts them to and from protobuf; `router.validation` checks what clients send before these are made.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Mapping


class FinishReason(enum.IntEnum):
    """Why a choice ended; the numbers are those of baton.v1.FinishReason."""

    NONE = 0
    STOP = 1
    LENGTH = 2


class GrammarKind(enum.StrEnum):
    """What a grammar's text is; the values are the field names of baton.v1.Grammar."""

    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"
    REGEX = "regex"
    CHOICE = "choice"
    LARK = "lark"


@dataclasses.dataclass(frozen=True, slots=True)
class Grammar:
    """What the text of a choice must match.

    Attributes:
        texts: the alternatives of CHOICE; nothing for JSON_OBJECT; else one text.
    """

    kind: GrammarKind
    texts: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Length in UTF-8."""
        return sum(len(text.encode()) for text in self.texts)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens, every default resolved.

    `seed` is always set (the router draws one if the client gave none), so that a replay samples the same tokens.
    `eos_token_ids` is empty where EOS is ignored. `logprobs` None means none; k means the k most likely beside the
    sampled; `prompt_logprobs` likewise, beside each token of the prompt. A choice with a `grammar` ends when nothing
    can follow, whatever `eos_token_ids` and `min_tokens` say. Stop *strings* are the router's and do not appear here.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    n: int = 1
    eos_token_ids: tuple[int, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None

    @property
    def ending_token_ids(self) -> frozenset[int]:
        """Tokens that end a choice, and that `min_tokens` keeps from being sampled."""
        return frozenset(self.eos_token_ids) | frozenset(self.stop_token_ids)

    def finish_reason(self, token_id: int, num_generated: int) -> FinishReason:
        """Whether `token_id`, the `num_generated`-th token of its choice (from 1), ends it; a grammar may too."""
        if num_generated >= self.min_tokens and (token_id in self.eos_token_ids or token_id in self.stop_token_ids):
            return FinishReason.STOP
        return FinishReason.LENGTH if num_generated >= self.max_tokens else FinishReason.NONE


@dataclasses.dataclass(frozen=True, slots=True)
class AttemptRef:
    """One try at one request. Both parts are made by the router; a worker never invents one."""

    request_id: str
    attempt: int


@dataclasses.dataclass(frozen=True, slots=True)
class Delivered:
    """Tokens of one choice that the client already has; they are forced, never resampled."""

    token_ids: tuple[int, ...] = ()
    finished: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RequestSpec:
    """What a worker is told of a request; a first try, a replay and a resumed preemption differ only in `delivered`.

    Attributes:
        ref: request and attempt.
        router_id: whose Attach stream the tokens go to.
        prompt_token_ids: at least one token.
        delivered: empty on a first try, else one entry for each choice.
        block_hashes: chained hash of each full block of the prompt.
        salt_root: parent of the first block's hash, for extending the chain with generated tokens.
        priority: lower runs sooner.
        timeout_s: seconds left until the client's deadline, on the receiver's clock from arrival; None for none.
        max_unacked_tokens: a choice with this many tokens that the router has not acknowledged is paused.
    """

    ref: AttemptRef
    router_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    delivered: tuple[Delivered, ...] = ()
    block_hashes: tuple[bytes, ...] = ()
    salt_root: bytes = b""
    priority: int = 0
    timeout_s: float | None = None
    max_unacked_tokens: int = 1024

    @property
    def shared_token_ids(self) -> tuple[int, ...]:
        """The prefix that all choices share, which prefill computes: the prompt, and for n = 1 what was delivered."""
        if self.sampling.n == 1 and self.delivered:
            return self.prompt_token_ids + self.delivered[0].token_ids
        return self.prompt_token_ids

    @property
    def first_position(self) -> int:
        """Position (within a choice) of the token that follows `shared_token_ids`."""
        return len(self.delivered[0].token_ids) if self.sampling.n == 1 and self.delivered else 0

    @property
    def sampled_choices(self) -> list[int]:
        """Choices whose token after `shared_token_ids` is sampled, because nothing is forced there."""
        if self.sampling.n == 1:
            return [0]
        return [choice for choice in range(self.sampling.n) if not self.forced_tokens(choice)]

    def first_outcomes(self, tokens: Iterable[Token]) -> dict[int, tuple[int, bool]]:
        """For each choice the token after `shared_token_ids`, sampled (`tokens`) or forced, and whether the choice has
        ended."""
        outcomes = {token.choice: (token.token_id, token.finish_reason is not FinishReason.NONE) for token in tokens}
        if self.sampling.n > 1:
            for choice, delivered in enumerate(self.delivered):
                if delivered.token_ids:
                    outcomes[choice] = (delivered.token_ids[0], delivered.finished)
        return outcomes

    def forced_tokens(self, choice: int) -> tuple[int, ...]:
        """The delivered tokens of a choice; empty on a first try."""
        return self.delivered[choice].token_ids if self.delivered else ()


@dataclasses.dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural-log probabilities at one position, of the model's distribution before temperature and filters."""

    sampled: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Token:
    """One generated token; (request, attempt, choice, position) names it everywhere."""

    ref: AttemptRef
    choice: int
    position: int
    token_id: int
    logprobs: Logprobs | None = None
    finish_reason: FinishReason = FinishReason.NONE
