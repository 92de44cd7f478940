"""What stands beside a result, and how it is written."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys

import click
import pytest
from matplotlib.patches import StepPatch

import baton
from bench import plots, provenance
from bench.load.runner import LoadRun
from bench.provenance import Provenance, redacted
from bench.report import Report, TableText, print_table, read_report, write_atomically
from tests.bench.load.outcomes import make_outcome


@pytest.fixture(scope="module")
def collected() -> Provenance:
    return Provenance.collect(packages=["numpy", "no-such-package"])


def test_the_machine_and_the_software_are_named(collected: Provenance) -> None:
    assert collected.machine.cpu
    assert 1 <= collected.machine.num_cores <= (os.cpu_count() or 1)
    assert collected.machine.memory_bytes > 1 << 28
    assert collected.versions["baton"] == baton.__version__
    assert collected.versions["numpy"] == importlib.metadata.version("numpy")
    assert "no-such-package" not in collected.versions
    assert collected.measured_at.endswith("+00:00")


def test_a_checkout_is_named_by_its_commit(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_REPOSITORY", tmp_path)
    assert (Provenance.collect().git_commit, Provenance.collect().git_is_dirty) == (None, None)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.com"]
    (tmp_path / "file").write_text("1")
    for arguments in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *arguments], check=True)
    clean = Provenance.collect()
    assert clean.git_commit is not None
    assert (len(clean.git_commit), clean.git_is_dirty) == (40, False)
    (tmp_path / "file").write_text("2")
    assert Provenance.collect().git_is_dirty is True


def test_keys_are_left_out_of_the_command() -> None:
    assert redacted(["--api-key", "k", "--rate", "1"]) == ["--api-key", "***", "--rate", "1"]
    assert redacted(["--api-key=k"]) == ["--api-key=***"]


def test_a_report_is_read_as_it_was_written(collected: Provenance, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "result.json"
    Report("serve", collected, {"rate": 2.0}, {"ttft_s": [0.5, None]}).write(path)
    assert read_report(path) == {
        "name": "serve",
        "provenance": json.loads(json.dumps(dataclasses.asdict(collected))),
        "parameters": {"rate": 2.0},
        "results": {"ttft_s": [0.5, None]},
    }


def test_what_json_has_not_is_refused_and_leaves_the_file(collected: Provenance, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("before")
    with pytest.raises(ValueError, match="not JSON compliant"):
        Report("serve", collected, {}, {"ttft_s": float("nan")}).write(path)
    assert path.read_text() == "before"


@pytest.mark.parametrize(
    ("content", "problem"), [("{", "Expecting"), ("[]", "lacks name"), ('{"name": 1}', "lacks prov")]
)
def test_a_file_that_is_no_report_is_refused(tmp_path: pathlib.Path, content: str, problem: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(click.UsageError, match=rf"other\.json: no report of a benchmark: {problem}"):
        read_report(path)


def test_a_write_that_fails_leaves_nothing(tmp_path: pathlib.Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        write_atomically(tmp_path / "taken", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(TableText("Times", ("", "ms"), [("first", "1.5")]))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["Times"]
    assert ["first", "1.5"] in lines


def test_plots_are_pictures_or_pages(tmp_path: pathlib.Path) -> None:
    load_run = LoadRun([make_outcome(1.0, 1.5, 2.5), make_outcome(error="unavailable")], 0.0, 3.5, interrupted=False)
    empty = LoadRun([], 0.0, 1.0, interrupted=True)
    figure = plots.draw({"a": load_run, "b": empty}, title="two runs")
    ttft, _, throughput, _ = figure.axes
    legend = ttft.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    # Three whole seconds and a half: tokens at 1.0, 1.5 and 2.5.
    tokens, _ = throughput.patches
    assert isinstance(tokens, StepPatch)
    assert tokens.get_data()[0].tolist() == [0.0, 2.0, 1.0, 0.0]
    plots.write_plot(tmp_path / "plot.png", figure, title="two runs")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    plots.write_plot(tmp_path / "plot.html", figure, title="<two>", tables=[TableText("T", ("", "ms"), [("a<b", "1")])])
    page = (tmp_path / "plot.html").read_text()
    assert "&lt;two&gt;" in page
    assert "<td>a&lt;b</td><td>1</td>" in page


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(click.UsageError, match=r"pip install 'baton\[bench\]'"):
        plots.require_matplotlib()
