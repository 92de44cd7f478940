"""Prompts that the demo model answers correctly, with the answer each one should get.

Everything here is plain text and the Python standard library, so a client can import it without
installing a tensor library.  A prompt ends right after ``Bot:`` (or in the middle of a text); what
the model generates starts with one space, which :func:`clean` strips.
"""

from __future__ import annotations

import random

USER = "User:"
"""What a user's turn starts with."""

BOT = "Bot:"
"""What the model's turn starts with."""

STORY = "Once upon a time"
"""A story to continue: some 130 tokens, then the end-of-sequence token."""

STORY_REQUEST = f"{USER} tell me a story\n{BOT}"
"""The same as a chat turn."""

ARITHMETIC = f"{USER} what is 12+7?\n{BOT}"
"""A sum, as a chat turn."""

ARITHMETIC_ANSWER = "19"
"""The answer to :data:`ARITHMETIC`."""

_WORDS = """
    red blue green yellow orange purple pink brown black white gray gold silver violet scarlet
    cat dog horse cow sheep goat pig hen duck goose fox wolf bear lion tiger zebra monkey rabbit
    mouse rat frog fish whale shark seal crab snail bee ant wasp spider eagle hawk owl crow swan
    apple pear plum peach cherry grape lemon lime melon banana mango fig olive onion carrot potato
    tomato pepper bean pea corn rice wheat bread butter cheese milk cream honey sugar salt soup
    tree oak pine maple willow rose lily tulip daisy grass moss leaf root seed branch forest
    river lake ocean island beach hill mountain valley desert cave cliff field meadow garden
    sun moon star cloud rain snow wind storm thunder fire ice smoke dust sand stone rock iron
    copper tin lead glass paper wood brick rope wire nail hammer saw drill ladder bucket brush
    table chair bed lamp clock mirror door window wall roof floor stair kitchen attic cellar
    book pen pencil ink map letter stamp coin key lock ring crown sword shield flag drum flute
    violin piano guitar bell horn car bus train truck wagon boat ship plane rocket wheel engine
    bridge road tower castle temple market school farm mill barn hat coat shirt shoe glove scarf
"""

KEYS: tuple[str, ...] = tuple(_WORDS.split())
"""The words that name a value in a recall question; each is one token after a space."""


def user_turn(text: str) -> str:
    """Return ``text`` as a user's turn that leaves the model to answer.

    Args:
        text: What the user says, on one line and without the role's name.

    Returns:
        The turn, ending with ``Bot:``.
    """
    return f"{USER} {text}\n{BOT}"


def clean(generated: str) -> str:
    """Return a generated answer without the spaces around it.

    Args:
        generated: The text that the model produced after ``Bot:``.

    Returns:
        The bare answer, comparable to the expected answers of this module.
    """
    return generated.strip()


def draw_pairs(num_pairs: int, rng: random.Random) -> dict[str, str]:
    """Draw distinct keys with random three-digit values.

    Args:
        num_pairs: How many pairs, from 1 to ``len(KEYS)``.
        rng: Where the randomness comes from.

    Returns:
        The value of each key, in the order in which the pairs are to be written.

    Raises:
        ValueError: If there are not that many keys.
    """
    if not 1 <= num_pairs <= len(KEYS):
        raise ValueError(f"num_pairs must be from 1 to {len(KEYS)}, not {num_pairs}")
    return {key: f"{rng.randrange(1000):03d}" for key in rng.sample(KEYS, num_pairs)}


def write_pairs(pairs: dict[str, str]) -> str:
    """Write pairs the way the model was taught to read them, ``blue=417; green=902``."""
    return "; ".join(f"{key}={value}" for key, value in pairs.items())


def recall_case(num_pairs: int, seed: int = 0) -> tuple[str, dict[str, str], str]:
    """Build a recall question together with all the pairs it holds.

    Args:
        num_pairs: How many pairs the prompt holds; each takes six tokens.
        seed: Chooses the pairs and the key that is asked for.

    Returns:
        The prompt, the value of every key in it, and the key that it asks for.
    """
    rng = random.Random(f"recall-{num_pairs}-{seed}")
    pairs = draw_pairs(num_pairs, rng)
    asked = rng.choice(list(pairs))
    prompt = f"{USER} remember {write_pairs(pairs)}\n{BOT} ok\n{user_turn(f'{asked}?')}"
    return prompt, pairs, asked


def recall_prompt(num_pairs: int, seed: int = 0) -> tuple[str, str]:
    """Build a recall question.

    Args:
        num_pairs: How many pairs the prompt holds; each takes six tokens.
        seed: Chooses the pairs and the key that is asked for.

    Returns:
        The prompt and the three digits that answer it.
    """
    prompt, pairs, asked = recall_case(num_pairs, seed)
    return prompt, pairs[asked]


def next_turn(prompt: str, answer: str, text: str) -> str:
    """Continue a conversation with the user's next turn.

    The result starts with ``prompt``, so a prefix cache that holds the first turn serves it.

    Args:
        prompt: The conversation so far, ending with ``Bot:``.
        answer: What the model answered.
        text: What the user says next.

    Returns:
        The longer conversation, ending with ``Bot:``.
    """
    return f"{prompt} {clean(answer)}\n{user_turn(text)}"


def follow_up(prompt: str, answer: str, seed: int = 0) -> tuple[str, str]:
    """Ask for another value as the turn after a recall question.

    Args:
        prompt: A prompt of :func:`recall_prompt`, or of this function.
        answer: What the model answered to it.
        seed: Chooses the key that is asked for, among those in the prompt.

    Returns:
        The prompt of the next turn, which starts with ``prompt``, and the answer to expect.

    Raises:
        ValueError: If the prompt holds no pairs to ask for.
    """
    facts = prompt.split("\n", 1)[0].removeprefix(f"{USER} remember ")
    pairs = dict(pair.split("=", 1) for pair in facts.split("; ") if "=" in pair)
    left = [key for key in pairs if f"{USER} {key}?" not in prompt]
    if not left:
        raise ValueError("the prompt holds no pair that was not asked for yet")
    asked = random.Random(f"follow-up-{seed}").choice(left)
    return next_turn(prompt, answer, f"{asked}?"), pairs[asked]
