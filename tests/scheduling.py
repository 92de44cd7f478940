"""How pytest-xdist shares the tests out among its processes: the tests of a file stay together, and all files that
start clusters of processes form one unit, so that two clusters never compete for the cores."""

from __future__ import annotations

import pathlib

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# A file that starts a cluster, or uses the one that tests share, has one of these in it.
_SIGNS = ("pytest.mark.clusters", "demo_cluster")


class ClustersInOneProcess(LoadScopeScheduling):
    """Units are files, but for those that start clusters."""

    def __init__(self, config: pytest.Config, log: Producer) -> None:
        super().__init__(config, log)
        self._root = config.rootpath
        self._units: dict[str, str] = {}

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        if file not in self._units:
            self._units[file] = "clusters" if _starts_clusters(self._root / file) else file
        return self._units[file]


def _starts_clusters(file: pathlib.Path) -> bool:
    text = file.read_text()
    return any(sign in text for sign in _SIGNS)
