"""The parts of a Markdown page that tests look at: code blocks, links, and what links can point to."""

from __future__ import annotations

import dataclasses
import pathlib
import re

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent.parent
DOCS = REPOSITORY / "docs"
PAGES = (REPOSITORY / "README.md", *sorted(DOCS.glob("*.md")))

_FENCE = re.compile(r"^```(\w*)\s*$")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} (.+)$")


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """A fenced block; `line` is that of its first line of text, from 1."""

    page: pathlib.Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"


def blocks(page: pathlib.Path) -> list[Block]:
    """Every fenced block of a page."""
    found: list[Block] = []
    language: str | None = None
    lines: list[str] = []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = _FENCE.match(line)
        if language is None and fence:
            language, lines = fence[1], []
        elif language is not None and line == "```":
            found.append(Block(page, number - len(lines), language, "\n".join(lines) + "\n"))
            language = None
        elif language is not None:
            lines.append(line)
    assert language is None, f"{page}: a block is not closed"
    return found


def prose(page: pathlib.Path) -> list[str]:
    """The lines of a page outside of code blocks."""
    inside = False
    kept = []
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            inside = not inside
        elif not inside:
            kept.append(line)
    return kept


def links(page: pathlib.Path) -> list[str]:
    """The targets of a page's links, in their order."""
    return [target for line in prose(page) for target in _LINK.findall(line)]


def anchors(page: pathlib.Path) -> set[str]:
    """What `page#anchor` can name: its headings, as GitHub writes them."""
    found: set[str] = set()
    for line in prose(page):
        if match := _HEADING.match(line):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", match[1]).lower()
            slug = re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-")
            count = sum(1 for anchor in found if re.fullmatch(re.escape(slug) + r"(-\d+)?", anchor))
            found.add(f"{slug}-{count}" if count else slug)
    return found
