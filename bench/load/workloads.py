"""Synthetic requests: random lengths, shared prefixes, conversations. Everything follows from a seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Self

import numpy as np

from bench.load.requests import LoadRequest, Message, Turn, is_chat
from bench.load.targets import ServedModel

# Below this are the special tokens of most vocabularies.
_FIRST_ORDINARY_TOKEN = 100
# Where a server does not tell; below the vocabulary of every model in use, and enough for prompts that share nothing.
_DEFAULT_VOCAB_SIZE = 1000
# What token ids become in chats: short words that most tokenizers have as one token each.
_WORDS = """
the of and to in is that for it as was with be by on not he his but at are this have from or had an they which one you
were her all she there would their we him been has when who will more no if out so said what up its about into than
them can only other new some could time these two may then do first any my now such like our over man me even most
made after also did many before must through back years where much your way well down should because each just those
people how too little state good very make world still own see men work long get here between both life being under
never day same another know while last might us great old year off come since
""".split()  # noqa: SIM905


@dataclasses.dataclass(frozen=True, slots=True)
class Lengths:
    """Numbers of tokens, drawn evenly from `low` to `high`, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads "256" or "128:512".

        Raises:
            ValueError: the text is neither, or a length is below 1.
        """
        low, separator, high = text.partition(":")
        if not low.isdecimal() or (separator and not high.isdecimal()):
            raise ValueError(f"must be N or N:MAX, got {text!r}")
        lengths = cls(int(low), int(high if separator else low))
        if not 1 <= lengths.low <= lengths.high:
            raise ValueError(f"must be at least 1, and N at most MAX, got {text!r}")
        return lengths

    def draw(self, generator: np.random.Generator) -> int:
        return int(generator.integers(self.low, self.high, endpoint=True))

    def __str__(self) -> str:
        return f"{self.low}" if self.low == self.high else f"{self.low}:{self.high}"


@dataclasses.dataclass(frozen=True, slots=True)
class Vocabulary:
    """Token ids to draw prompts from: those in [low, high)."""

    low: int
    high: int

    @classmethod
    def of_model(cls, model: ServedModel, size: int | None = None) -> Self:
        """That of a served model; `size` wins over what the server tells."""
        return cls.of_size(size or model.vocab_size or _DEFAULT_VOCAB_SIZE)

    @classmethod
    def of_size(cls, size: int) -> Self:
        """All but the first 100 ids, which are often special, or but half of a small vocabulary.

        Raises:
            ValueError: there are fewer than two tokens.
        """
        if size < 2:
            raise ValueError(f"vocabulary size: must be at least 2, got {size}")
        return cls(min(_FIRST_ORDINARY_TOKEN, size // 2), size)

    def draw(self, generator: np.random.Generator, count: int) -> list[int]:
        drawn: list[int] = generator.integers(self.low, self.high, count).tolist()
        return drawn


def random_requests(
    vocabulary: Vocabulary, inputs: Lengths, outputs: Lengths, num_requests: int, seed: int
) -> Iterator[LoadRequest]:
    """Prompts that share nothing."""
    generator = np.random.default_rng(seed)
    for _ in range(num_requests):
        yield LoadRequest(vocabulary.draw(generator, inputs.draw(generator)), outputs.draw(generator))


def shared_prefix_requests(
    vocabulary: Vocabulary,
    inputs: Lengths,
    outputs: Lengths,
    num_requests: int,
    seed: int,
    *,
    num_groups: int,
    prefix_tokens: int,
) -> Iterator[LoadRequest]:
    """`num_groups` groups, each with a prefix of its own that all its prompts begin with; they take turns at random.

    `inputs` is what each prompt has beside its prefix.
    """
    generator = np.random.default_rng(seed)
    prefixes = [vocabulary.draw(generator, prefix_tokens) for _ in range(num_groups)]
    for _ in range(num_requests):
        prefix = prefixes[generator.integers(num_groups)]
        own = vocabulary.draw(generator, inputs.draw(generator))
        yield LoadRequest([*prefix, *own], outputs.draw(generator))


def multi_turn_requests(
    vocabulary: Vocabulary,
    inputs: Lengths,
    outputs: Lengths,
    num_conversations: int,
    seed: int,
    *,
    num_turns: int,
    think_s: float,
) -> Iterator[LoadRequest]:
    """Conversations: each turn's prompt is everything before it, answers included, and `inputs` new tokens."""
    generator = np.random.default_rng(seed)
    for _ in range(num_conversations):
        first, *rest = [
            Turn(vocabulary.draw(generator, inputs.draw(generator)), outputs.draw(generator), think_s)
            for _ in range(num_turns)
        ]
        yield LoadRequest(first.prompt, first.max_tokens, None, tuple(rest))


def as_chats(requests: Iterable[LoadRequest]) -> Iterator[LoadRequest]:
    """The same requests as messages of a user, a word for each token id: what was shared stays so.

    How many tokens the words and the template make is the model's affair, and told by its usage.
    """
    for request in requests:
        assert not isinstance(request.prompt, str)
        assert not is_chat(request.prompt)
        message: Message = {"role": "user", "content": _words(request.prompt)}
        turns = tuple(dataclasses.replace(turn, prompt=_words(turn.prompt)) for turn in request.follow_ups)  # type: ignore[arg-type]
        yield dataclasses.replace(request, prompt=[message], follow_ups=turns)


def _words(token_ids: Iterable[int]) -> str:
    return " ".join(_WORDS[token_id % len(_WORDS)] for token_id in token_ids)
