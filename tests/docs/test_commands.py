"""Every command and program on the pages does what it says, against a real cluster."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator

import pytest
import yaml

from deploy.settings import read, schema
from tests.cluster.harness import ClusterUnderTest
from tests.docs.commands import commands, words
from tests.docs.kinds import check_of, split_environment
from tests.docs.markdown import DOCS, PAGES, REPOSITORY, Block, blocks
from tests.docs.workplace import Workplace
from tests.tools import node, tool

CODE = [
    page
    for page in PAGES
    if {"sh", "bash", "python", "js", "yaml", "promql"} & {block.language for block in blocks(page)}
]


def relative(page: pathlib.Path) -> str:
    return str(page.relative_to(REPOSITORY))


@pytest.fixture
def workplace(
    demo_cluster: ClusterUnderTest, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Workplace]:
    """One for each page: a page's blocks may build on those before them."""
    place = Workplace(tmp_path, demo_cluster)
    monkeypatch.chdir(tmp_path)
    yield place
    place.close()


@pytest.mark.parametrize("page", CODE, ids=relative)
def test_everything_on_the_page_runs(page: pathlib.Path, workplace: Workplace) -> None:
    for block in blocks(page):
        if block.language in ("sh", "bash"):
            run_shell(block, workplace)
        elif block.language == "js":
            workplace.run_js(block)
        elif block.language == "yaml":
            check_yaml(block, workplace)
        elif block.language == "promql":
            check_promql(block, workplace)
    if programs := [block for block in blocks(page) if block.language == "python"]:
        workplace.run_python(programs)


def run_shell(block: Block, workplace: Workplace) -> None:
    """Runs the commands of a block in one shell, but for those that are checked; what they export stays."""
    exports: list[str] = []
    script: list[str] = []
    for command in commands(block.text):
        check = check_of(command)
        if check is None:
            script.append(command)
            exports += [command] if command.startswith("export ") else []
            continue
        _run(block, exports, script, workplace)
        script = []
        check(words(workplace.rewrite(command)), workplace)
    _run(block, exports, script, workplace)


def _run(block: Block, exports: list[str], script: list[str], workplace: Workplace) -> None:
    if script:
        _require_programs(script)
        before = [command for command in exports if command not in script]
        workplace.run_shell(block.place, "\n".join([*before, *script]))


def _require_programs(script: list[str]) -> None:
    """Skips where a program is missing that machines need not have."""
    for command in script:
        name = split_environment(words(command))[1][0]
        if name == "node":
            node()
        elif name in ("curl", "openssl", "promtool"):
            tool(name)


def check_yaml(block: Block, workplace: Workplace) -> None:
    """Configurations of Baton are valid; all else is YAML."""
    documents = list(yaml.safe_load_all(block.text))
    names = {*(path[0] for path in schema.sections()), *schema.aliases()}
    if len(documents) == 1 and isinstance(documents[0], dict) and set(documents[0]) <= names:
        file = workplace.folder / "block.yaml"
        file.write_text(workplace.rewrite(block.text))
        read(str(file), {} if "model" in documents[0] else {"--model": "deploy/demo/model"}, {})


def check_promql(block: Block, workplace: Workplace) -> None:
    """Expressions, with empty lines between them, that Prometheus understands and whose series exist."""
    expressions = [expression for expression in block.text.split("\n\n") if expression.strip()]
    rules = [{"record": f"page:rule:{number}", "expr": text} for number, text in enumerate(expressions)]
    file = workplace.folder / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "page", "rules": rules}]}))
    workplace.run_shell(block.place, f"{tool('promtool')} check rules rules.yml")
    series = set(re.findall(r"baton_\w+", (DOCS / "metrics.md").read_text()))
    for name in re.findall(r"\bbaton_\w+", block.text):
        assert {name, re.sub(r"_(sum|count|bucket)$", "", name)} & series, f"{block.place}: {name}"


def test_a_command_of_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(LookupError, match="no row"):
        check_of("rm -rf /")


def test_blocks_are_split_into_commands() -> None:
    text = "# a comment\nmake run   # another\nA=1 curl -s \\\n  http://x\ncat > f <<'EOF'\nit's\nEOF\n\necho 'a\nb'\n"
    assert commands(text) == [
        "make run   # another",
        "A=1 curl -s \\\n  http://x",
        "cat > f <<'EOF'\nit's\nEOF",
        "echo 'a\nb'",
    ]
