"""Starts are timed from the command to the ready file, with and without compiled kernels."""

from __future__ import annotations

import json
import pathlib
import sys

import pytest
from click.testing import CliRunner
from matplotlib.patches import Rectangle

from bench import startup
from bench.cli import bench
from bench.startup import Start, draw, read_steps, summarize

LOG = """\
   0.0 s  1 thread a worker
   0.0 s  loading model on prefill-0, decode-0
warning: nothing of this
   3.2 s  decode-0 is up (epoch 2, pid 77)
ready in 3.3 s: gRPC 127.0.0.1:1, HTTP http://127.0.0.1:2
"""

# Compiles where nothing is compiled, tells a step, and is ready.
PROGRAM = """
import os, pathlib, signal, sys
(pathlib.Path(os.environ["NUMBA_CACHE_DIR"]) / "kernel").touch()
print("   0.1 s  decode-0 is up (epoch 1, pid 3)", file=sys.stderr, flush=True)
assert sys.argv[1] == "--runtime" and sys.argv[3] == "--ready-file"
pathlib.Path(sys.argv[4]).touch()
signal.pause()
"""


def start(runtime: startup.Runtime, is_cold: bool, ready_s: float) -> Start:
    return Start(runtime, is_cold, ready_s, ((0.5, "decode-0 is up"),), cpu_s=2.0)


STARTS = [
    *(start("process", True, 30.0), start("process", False, 9.0), start("process", False, 7.0)),
    *(start("process", False, 7.5), start("ray", True, 40.0), start("ray", False, 21.0)),
]


def test_steps_are_read_from_the_log() -> None:
    assert read_steps(LOG) == (
        (0.0, "1 thread a worker"),
        (0.0, "loading model on prefill-0, decode-0"),
        (3.2, "decode-0 is up"),
    )


def test_aims_are_of_starts_with_cached_kernels() -> None:
    ready, steps = summarize(STARTS)
    assert list(ready.rows) == [
        ("process, empty cache", "30.0", "30.0 to 30.0", "2.0", "", ""),
        ("process, cached kernels", "7.5", "7.0 to 9.0", "2.0", "<= 8", "pass"),
        ("ray, empty cache", "40.0", "40.0 to 40.0", "2.0", "", ""),
        ("ray, cached kernels", "21.0", "21.0 to 21.0", "2.0", "<= 20", "miss"),
    ]
    assert steps.rows[0] == ("process, empty cache: decode-0 is up", "0.5")
    assert len(steps.rows) == 4


def test_the_plot_has_a_bar_for_each_kind() -> None:
    (axes,) = draw(STARTS, title="starts").axes
    bars = [bar for bar in axes.patches if isinstance(bar, Rectangle)]
    assert [bar.get_width() for bar in bars] == [30.0, 7.5, 40.0, 21.0]


def test_the_command_starts_cold_then_warm(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "BATON_SERVE", (sys.executable, "-c", PROGRAM))
    arguments = ["startup", "--model", str(tmp_path), "--runtime", "process", "--rounds", "1"]
    result = CliRunner().invoke(bench, [*arguments, "--output", str(tmp_path / "out.json")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [found["is_cold"] for found in results["starts"]] == [True, False]
    assert [found["steps"] for found in results["starts"]] == [[[0.1, "decode-0 is up"]]] * 2
    assert results["aims_s"] == {"process": 8.0, "ray": 20.0}
