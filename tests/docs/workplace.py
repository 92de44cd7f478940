"""Where the commands of the pages run: a folder that looks like the repository, beside a cluster that serves."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence

from baton.config import ServeConfig
from tests.cluster.harness import ClusterUnderTest
from tests.docs.markdown import REPOSITORY, Block
from tests.node_programs import lay_out
from tests.router.alone import running_router
from tests.tools import node

# What a page writes goes beside these, not into them.
_COPIED = {"examples"}
_HIDDEN = {".git", "build"}

# Runs blocks in one interpreter, each with names of its own. Reads [[place, text], ...] from stdin.
_PYTHON = """
import json, sys
for place, text in json.load(sys.stdin):
    print(f"--- {place}", flush=True)
    exec(compile(text, place, "exec"), {"__name__": "__main__"})
"""


class Workplace:
    """Addresses that the pages give as defaults are the cluster's here; so are those that the commands default to."""

    def __init__(self, folder: pathlib.Path, cluster: ClusterUnderTest) -> None:
        self.folder = folder
        self._routers = contextlib.ExitStack()
        lay_out(folder)
        for entry in REPOSITORY.iterdir():
            if entry.name not in _HIDDEN | _COPIED and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
        (folder / "examples" / "python").symlink_to(REPOSITORY / "examples" / "python")
        # A page's curl shows answers; here a status that is an error must fail it.
        (folder / ".curlrc").write_text("fail\n")
        self.environment = {
            **os.environ,
            "CURL_HOME": str(folder),
            "PATH": f"{REPOSITORY / '.venv' / 'bin'}:{os.environ['PATH']}",
            # Rich and click take the pages' commands for what a user types.
            "COLUMNS": "120",
        }
        self._use(cluster.target, cluster.url)

    def serve(self, config: ServeConfig) -> None:
        """From now on the router of this configuration is the one that the page talks of, on free ports."""
        router = self._routers.enter_context(running_router(config))
        self._use(router.grpc_address, router.url)

    def close(self) -> None:
        """Ends what the page has started."""
        self._routers.close()

    def _use(self, target: str, url: str) -> None:
        self.target, self.url = target, url
        self.environment |= {"BATON_TARGET": target, "BATON_URL": url}

    def rewrite(self, text: str) -> str:
        """The text with this cluster's addresses and a checkpoint that exists."""
        http = self.url.partition("//")[2]
        for host in ("127.0.0.1", "localhost"):
            text = text.replace(f"{host}:8000", http).replace(f"{host}:50051", self.target)
        return text.replace("path/to/checkpoint", "deploy/demo/model")

    def run_shell(self, place: str, script: str) -> str:
        """Runs a script that must succeed, and returns what it printed."""
        return self._run(place, ["bash", "-euo", "pipefail", "-c", self.rewrite(script)])

    def run_python(self, blocks: Sequence[Block]) -> None:
        """Runs blocks in their order."""
        texts = json.dumps([[block.place, self.rewrite(block.text)] for block in blocks])
        self._run(str(blocks[0].page.name), [sys.executable, "-W", "error", "-c", _PYTHON], stdin=texts)

    def run_js(self, block: Block) -> None:
        """Runs a block as a module beside the examples."""
        program = self.folder / "examples" / "node" / f"block-{block.line}.mjs"
        program.write_text(self.rewrite(block.text))
        self._run(block.place, [node(), str(program)])

    def _run(self, place: str, command: Sequence[str], stdin: str = "") -> str:
        result = subprocess.run(
            command, cwd=self.folder, env=self.environment, input=stdin, capture_output=True, text=True, timeout=90
        )
        assert result.returncode == 0, f"{place}: exit status {result.returncode}\n{result.stdout}\n{result.stderr}"
        return result.stdout
