"""Reads a Dockerfile."""

from __future__ import annotations

import dataclasses
import pathlib


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction, its lines joined."""

    name: str
    arguments: str


def parse(path: pathlib.Path) -> list[Instruction]:
    """The instructions of a Dockerfile, in order, without comments."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    found = []
    for line in joined.splitlines():
        name, _, arguments = line.partition(" ")
        found.append(Instruction(name.upper(), " ".join(arguments.split())))
    return found
