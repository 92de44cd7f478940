"""The corpus of the demo model, generated from a seed: recall, arithmetic, stories and chat.

A document is its text together with the parts of it that the model is to produce itself.  Nothing
is learned from the rest: the pairs of a recall question are random, and predicting them is noise.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from deploy.demo.prompts import BOT, KEYS, USER, draw_pairs, write_pairs
from deploy.demo.stories import BOYS, GIRLS, story

SMALL_TALK = (
    ("hello", "hello, how can I help you?"),
    ("hi", "hello, how can I help you?"),
    ("who are you?", "I am the Baton demo model."),
    ("what is your name?", "I am the Baton demo model."),
    ("what can you do?", "I remember numbers, add and subtract, and tell stories."),
    ("how are you?", "I am fine, thank you."),
    ("thank you", "you are welcome."),
    ("thanks", "you are welcome."),
    ("bye", "goodbye."),
)


LIMITS = (10, 20, 50, 100, 100)
"""What the numbers of a problem stay below: easy problems lead the way to the hard ones."""


@dataclass
class Document:
    """One text and the parts of it that are to be learned.

    Attributes:
        text: The whole text.
        answers: Half-open character ranges of ``text``.  The model learns to produce each range
            and then to end the sequence, even where the text goes on with the next turn.
    """

    text: str = ""
    answers: list[tuple[int, int]] = field(default_factory=list)

    def add(self, given: str, answer: str, after: str = "\n") -> None:
        """Append a given part, the answer to it, and what stands between it and the next part."""
        start = len(self.text) + len(given)
        self.answers.append((start, start + len(answer)))
        self.text += given + answer + after

    def turn(self, said: str, answer: str) -> None:
        """Append one turn of the user and the bot's answer to it."""
        self.add(f"{USER} {said}\n{BOT}", f" {answer}")


def problem(rng: random.Random, limit: int | None = None) -> tuple[str, str]:
    """Draw a sum or a difference of two numbers and its non-negative result.

    Args:
        rng: Where the randomness comes from.
        limit: The numbers are below it; drawn from :data:`LIMITS` when absent.

    Returns:
        The problem, such as ``12+7``, and its result.
    """
    limit = limit or rng.choice(LIMITS)
    left, right = rng.randrange(limit), rng.randrange(limit)
    if rng.random() < 0.5:
        return f"{left}+{right}", str(left + right)
    left, right = max(left, right), min(left, right)
    return f"{left}-{right}", str(left - right)


def arithmetic(rng: random.Random, count: int) -> Document:
    """Write ``count`` problems, as chat turns or as lines such as ``12+7=19``."""
    document = Document()
    chat = rng.random() < 0.3
    for _ in range(count):
        question, result = problem(rng)
        if chat:
            document.turn(f"what is {question}?", result)
        else:
            document.add(f"{question}=", result)
    return document


def recall(rng: random.Random, num_pairs: int, num_questions: int) -> Document:
    """Write a conversation that gives pairs and then asks for their values.

    Args:
        rng: Where the randomness comes from.
        num_pairs: How many pairs are given, most of them in the first turn.
        num_questions: How many turns follow; one in ten asks for several values at once, one in
            sixteen is about something else.

    Returns:
        The conversation.  In one of three the first question stands in the turn that gives the
        pairs, in the others that turn is answered with ``ok``.
    """
    document = Document()
    pairs = draw_pairs(num_pairs, rng)
    keys = list(pairs)
    late = rng.randrange(1, 4) if num_pairs > 6 and rng.random() < 0.3 else 0
    known = keys[: len(keys) - late]
    facts = f"remember {write_pairs({key: pairs[key] for key in known})}"
    if rng.random() < 1 / 3:
        asked = rng.choice(known)
        document.turn(f"{facts}. {asked}?", pairs[asked])
    else:
        document.turn(facts, "ok")
    late_turn = rng.randrange(num_questions) if late else -1
    for index in range(num_questions):
        if index == late_turn:
            new = keys[len(known) :]
            document.turn(f"remember {write_pairs({key: pairs[key] for key in new})}", "ok")
            known = keys
        elif rng.random() < 1 / 16:
            document.turn(*small_turn(rng))
        elif rng.random() < 1 / 10:
            several = rng.sample(known, min(len(known), rng.randrange(2, 6)))
            document.turn(f"{', '.join(several)}?", write_pairs({key: pairs[key] for key in several}))
        else:
            asked = rng.choice(known)
            document.turn(f"{asked}?", pairs[asked])
    return document


def small_turn(rng: random.Random) -> tuple[str, str]:
    """Draw a turn that is about no pair: a problem or small talk, with its answer."""
    if rng.random() < 0.5:
        question, result = problem(rng)
        return f"what is {question}?", result
    return rng.choice(SMALL_TALK)


def tale(rng: random.Random) -> Document:
    """Write a story, to be continued from its first words or asked for in a chat turn."""
    document = Document()
    if rng.random() < 0.5:
        opening = "Once upon a time"
        document.add(opening, story(rng).removeprefix(opening), after="")
    elif rng.random() < 0.5:
        document.turn("tell me a story", story(rng))
    else:
        name = rng.choice(GIRLS + BOYS)
        document.turn(f"tell me a story about {name}", story(rng, name))
    return document


def chat(rng: random.Random) -> Document:
    """Write a short conversation of problems and small talk."""
    document = Document()
    for _ in range(rng.randrange(1, 6)):
        document.turn(*small_turn(rng))
    return document


def recall_of_length(rng: random.Random, length: int) -> Document:
    """Write a recall conversation of about ``length`` tokens, 10 to 80 % of them pairs."""
    num_pairs = max(2, min(len(KEYS), int(length * rng.uniform(0.1, 0.8) / 6)))
    return recall(rng, num_pairs, max(1, (length - 6 * num_pairs) // 12 + 1))


def fillers(rng: random.Random) -> Iterator[Document]:
    """Yield documents without pairs, without end."""
    while True:
        draw = rng.random()
        if draw < 0.75:
            yield arithmetic(rng, rng.randrange(1, 24))
        elif draw < 0.94:
            yield tale(rng)
        else:
            yield chat(rng)


def tokenizer_texts(rng: random.Random) -> Iterator[str]:
    """Yield the texts from which the tokenizer learns, every key often enough to be one token."""
    for _ in range(200):
        yield " ".join(["", *rng.sample(KEYS, len(KEYS))])
        yield recall(rng, 20, 4).text
        yield arithmetic(rng, 4).text
    for _ in range(1500):
        yield tale(rng).text
        yield chat(rng).text
