"""Splits a shell block into commands."""

from __future__ import annotations

import re
import shlex

_HEREDOC = re.compile(r"<<-?\s*(['\"]?)(\w+)\1")


def commands(text: str) -> list[str]:
    """The commands of a block in their order: each a line, with those that continue it and a here-document's text.

    Comments are left out.
    """
    found: list[str] = []
    pending: list[str] = []
    delimiter = ""
    for line in text.splitlines():
        pending.append(line)
        if delimiter:
            if line.strip() != delimiter:
                continue
            delimiter = ""
        elif match := _HEREDOC.search(line):
            delimiter = match[2]
            continue
        elif line.endswith("\\") or not _is_complete("\n".join(pending)):
            continue
        command = "\n".join(pending)
        pending = []
        if shlex.split(command.partition("<<")[0], comments=True):
            found.append(command.strip())
    assert not pending, f"unfinished: {pending}"
    return found


def words(command: str) -> list[str]:
    """The words of a command, its environment assignments and redirections included, without comments."""
    return shlex.split(command.replace("\\\n", " "), comments=True)


def _is_complete(command: str) -> bool:
    try:
        shlex.split(command, comments=True)
    except ValueError:
        return False
    return True
