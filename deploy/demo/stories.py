"""Templated short stories whose names, places and things stay the same from start to end."""

from __future__ import annotations

import random

OPENINGS = ("there was", "there lived")

GIRLS = ("Mia", "Anna", "Lily", "Sara", "Emma", "Nora")
BOYS = ("Tom", "Ben", "Max", "Leo", "Sam", "Jack")
TRAITS = ("little", "kind", "brave", "clever", "curious", "cheerful")
PLACES = (
    "in a small village near the sea",
    "in a house at the edge of the forest",
    "in a quiet town by the river",
    "on a farm behind the green hills",
    "in a tall tower in the old city",
)
ANIMALS = ("dog", "cat", "rabbit", "fox", "owl", "duck", "pony")
TOYS = ("kite", "ball", "drum", "boat", "lantern", "basket")
COLOURS = ("red", "blue", "green", "yellow", "white")
FOODS = ("an apple", "some bread", "a warm soup", "a piece of cake", "a sweet pear")
HIDEOUTS = ("under a bush", "behind a big stone", "at the top of a tree", "beside the old well")
PLANTS = ("a sunflower", "an apple tree", "a red rose", "a giant pumpkin")


def _opening(rng: random.Random, girl: bool, name: str) -> str:
    """Introduce the hero of a story."""
    return (
        f"Once upon a time, {rng.choice(OPENINGS)} a {rng.choice(TRAITS)} "
        f"{'girl' if girl else 'boy'} named {name}. "
        f"{'She' if girl else 'He'} lived {rng.choice(PLACES)}."
    )


def _lost_toy(rng: random.Random, name: str, he: str, his: str) -> list[str]:
    """A toy is lost and an animal finds it."""
    toy, colour, animal = rng.choice(TOYS), rng.choice(COLOURS), rng.choice(ANIMALS)
    return [
        f"{name} had a {colour} {toy}, and {he} took it everywhere.",
        f"One windy day the {colour} {toy} was gone.",
        f"{name} looked in the garden and in the kitchen, but {he} could not find it.",
        f"Then a friendly {animal} came to the door.",
        f'"I saw your {toy}," said the {animal}. "It is {rng.choice(HIDEOUTS)}."',
        f"They walked there together, and there was the {colour} {toy}.",
        f"{name} thanked the {animal} and gave it {rng.choice(FOODS)}.",
        f"From that day on, {name} and the {animal} were best friends.",
    ]


def _garden(rng: random.Random, name: str, he: str, his: str) -> list[str]:
    """A seed grows because somebody takes care of it."""
    plant, animal = rng.choice(PLANTS), rng.choice(ANIMALS)
    return [
        f"One spring morning {name} found a tiny seed on the path.",
        f"{he.capitalize()} put it in the ground behind {his} house.",
        f"Every day {name} gave the seed some water, and {his} {animal} sat next to it.",
        "For a long time nothing happened, and everyone laughed.",
        f"But {name} did not give up.",
        f"When the summer came, the seed had become {plant}.",
        "All the people came to look at it, and nobody laughed any more.",
        f"{name} smiled and hugged {his} {animal}.",
    ]


def _rescue(rng: random.Random, name: str, he: str, his: str) -> list[str]:
    """An animal in need is helped, and helps in return."""
    animal, food = rng.choice(ANIMALS), rng.choice(FOODS)
    return [
        f"One evening {name} heard a soft cry {rng.choice(HIDEOUTS)}.",
        f"It was a small {animal} that had hurt its leg.",
        f"{name} carried the {animal} home and gave it {food}.",
        f"After a week the {animal} could run again.",
        f"Some days later {name} got lost in the dark forest.",
        f"{he.capitalize()} was afraid, but then the {animal} came out of the shadows.",
        f"The {animal} showed {name} the way home.",
        f'"You helped me, and now I helped you," said the {animal}.',
    ]


def _voyage(rng: random.Random, name: str, he: str, his: str) -> list[str]:
    """A journey that ends at home."""
    animal, colour, food = rng.choice(ANIMALS), rng.choice(COLOURS), rng.choice(FOODS)
    return [
        f"{name} wanted to see the world, so {he} built a {colour} boat.",
        f"{he.capitalize()} packed {food} and called {his} {animal}.",
        f"The {colour} boat sailed for three days, and the {animal} slept in the sun.",
        "On the fourth day they came to an island where no one lived.",
        f"{name} and the {animal} climbed the highest hill and looked at the sea.",
        f'"The world is big," said {name}, "but I miss my home."',
        f"So they turned the {colour} boat around and sailed back.",
        f"That night {name} told everyone about the island.",
    ]


PLOTS = (_lost_toy, _garden, _rescue, _voyage)
ENDINGS = ("The end.", "And they all lived happily ever after.")


def story(rng: random.Random, name: str | None = None) -> str:
    """Write one story.

    Args:
        rng: Where the choices come from.
        name: The hero's name, one of :data:`GIRLS` or :data:`BOYS`; drawn when absent.

    Returns:
        One paragraph of 100 to 120 words, some 130 tokens, that starts with ``Once upon a time``.
    """
    hero = name if name is not None else rng.choice(GIRLS + BOYS)
    girl = hero in GIRLS
    plot = rng.choice(PLOTS)
    body = plot(rng, hero, "she" if girl else "he", "her" if girl else "his")
    return " ".join([_opening(rng, girl, hero), *body, rng.choice(ENDINGS)])
