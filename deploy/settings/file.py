"""Reads settings from a YAML file: sections with values, or values at the top by the names of their flags."""

from __future__ import annotations

import difflib
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import yaml

from deploy.errors import StartError
from deploy.settings import schema
from deploy.settings.setting import Setting

# What YAML's messages quote of its own: a sign or two, or the kind of a token.
_SIGN = re.compile(r"\W{3,4}|['\"]<[a-z ]+>['\"]")


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which says where each node is."""


def read_file(file: str) -> list[Setting]:
    """The settings of a file.

    Raises:
        StartError: it cannot be read, is not YAML, or names something unknown or twice; says in which line.
    """
    try:
        text = pathlib.Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text in UTF-8"
        raise StartError(f"--config {file}: {reason}") from error
    try:
        return _read(file, text)
    except yaml.YAMLError as error:
        # The causes are left out as well: all that they quote of the file may be a secret.
        raise StartError(f"--config {file}: not YAML: {_describe(error, text)}") from None


def _read(file: str, text: str) -> list[Setting]:
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return []
        if not isinstance(root, yaml.MappingNode):
            raise StartError(f"--config {file}: must hold names and values, such as model: DIR")
        return _Reader(file, loader).read(root)
    finally:
        loader.dispose()


class _Reader:
    """Turns the nodes of one file into settings."""

    def __init__(self, file: str, loader: _Loader) -> None:
        self._file = file
        self._loader = loader

    def read(self, root: yaml.MappingNode) -> list[Setting]:
        settings: dict[schema.Path, Setting] = {}
        for setting in self._section((), root):
            other = settings.setdefault(setting.path, setting)
            if other is not setting:
                raise StartError(
                    f"{setting.where}: {setting.name} and {other.name} ({other.where}) are the same setting; keep one"
                )
        return list(settings.values())

    def _section(self, within: schema.Path, mapping: yaml.MappingNode) -> Iterator[Setting]:
        for name, key, node in self._entries(mapping, within):
            path = (*within, name)
            place = ".".join(path)
            if path in schema.sections() and isinstance(node, yaml.MappingNode):
                yield from self._section(path, node)
            elif path in schema.values():
                yield self._setting(path, place, key, node)
            elif not within and name in schema.aliases():
                yield self._setting(schema.aliases()[name], name, key, node)
            elif path not in schema.sections():
                raise StartError(f"{self._where(key)}: {place}: unknown name{_suggest_in(within, name)}")
            elif not _is_null(node):
                raise StartError(f"{self._where(key)}: {place}: must be a section, with names and values under it")

    def _entries(self, mapping: yaml.MappingNode, within: schema.Path) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
        self._loader.flatten_mapping(mapping)
        seen: dict[str, yaml.Node] = {}
        for key, node in mapping.value:
            name = str(self._loader.construct_object(key, deep=True))
            if name in seen:
                place = ".".join((*within, name))
                raise StartError(f"{self._where(key)}: {place}: is in {self._where(seen[name])} already")
            seen[name] = key
            yield name, key, node

    def _setting(self, path: schema.Path, name: str, key: yaml.Node, node: yaml.Node) -> Setting:
        value: Any = self._loader.construct_object(node, deep=True)
        return Setting(path, value, name=name, where=self._where(key))

    def _where(self, node: yaml.Node) -> str:
        return f"{self._file}:{node.start_mark.line + 1}"


def suggest(name: str, known: list[str]) -> str:
    """A question that names what was perhaps meant, to follow "unknown name"."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""


def _suggest_in(section: schema.Path, name: str) -> str:
    """Where another section has the name, that place; else what is most like it."""
    if not section:
        return suggest(name, [*(path[0] for path in schema.sections()), *schema.aliases()])
    elsewhere = [value.place for path, value in schema.values().items() if path[-1] == name]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    if name in schema.aliases():
        return f"; did you mean {'.'.join(schema.aliases()[name])}?"
    return suggest(".".join((*section, name)), [value.place for value in schema.values().values()])


def _describe(error: yaml.YAMLError, text: str) -> str:
    """What is wrong, and where, without the text around it, which YAML's own message quotes."""
    if isinstance(error, yaml.reader.ReaderError):
        return f"{error.reason}, line {text.count(chr(10), 0, error.position) + 1}"
    assert isinstance(error, yaml.MarkedYAMLError)
    # Signs and the names of tokens are kept; aliases and tags are the user's.
    problem = re.sub(
        r"'[^']*'|\"[^\"]*\"", lambda quoted: quoted[0] if _SIGN.fullmatch(quoted[0]) else "", error.problem or ""
    )
    mark = error.problem_mark
    return " ".join(problem.split()) + (f", line {mark.line + 1}, column {mark.column + 1}" if mark else "")


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"
