from __future__ import annotations

import pathlib
import re

import pytest

from tests.docs.markdown import DOCS, PAGES, REPOSITORY, anchors, blocks, links, prose

INDEX = DOCS / "README.md"
LANGUAGES = {"sh", "bash", "python", "js", "yaml", "json", "text", "promql"}


def relative(page: pathlib.Path) -> str:
    return str(page.relative_to(REPOSITORY))


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_link_inside_the_repository_leads_somewhere(page: pathlib.Path) -> None:
    broken = []
    for link in links(page):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or not target.is_relative_to(REPOSITORY) or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_every_page_can_be_reached_from_the_index() -> None:
    reached = {INDEX}
    while new := {target for page in reached for target in pages_linked(page)} - reached:
        reached |= new
    assert {page.name for page in DOCS.glob("*.md")} == {page.name for page in reached}


def pages_linked(page: pathlib.Path) -> list[pathlib.Path]:
    targets = [(page.parent / link.partition("#")[0]).resolve() for link in links(page) if "://" not in link]
    return [target for target in targets if target.suffix == ".md" and target.parent == DOCS and target.is_file()]


def test_the_readme_leads_to_the_index() -> None:
    assert INDEX in pages_linked(REPOSITORY / "README.md")


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_block_says_what_it_is(page: pathlib.Path) -> None:
    assert {block.place: block.language for block in blocks(page) if block.language not in LANGUAGES} == {}


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_prose_is_wrapped(page: pathlib.Path) -> None:
    lines = [] if re.search("<!-- (Generated|Made) by", page.read_text()) else prose(page)
    assert [line for line in lines if len(line) > 140 and not line.startswith("|") and "](" not in line] == []
