"""Two servers take turns, and their rounds become ratios."""

from __future__ import annotations

import json
import pathlib
import shlex
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from baton.errors import UnavailableError
from bench.cli import bench
from bench.compare import Visit, advantages, compare, draw, order, summarize
from bench.interference import Mix
from bench.load.targets import Target
from bench.scenarios import InterferenceScenario, Metric, Sample
from tests.bench.conftest import FAKE_SERVER, fake_spec

NAMES = ("ours", "theirs")


class Served:
    """A scenario that only asks what is served."""

    help = "one question"
    metrics = (Metric("rate_per_s", "rate", higher_is_better=True, aim=2.0), Metric("wait_s", "wait, ms", scale=1e3))

    def scaled(self, share: float, *, vocab_size: int) -> Served:
        return self

    async def run(self, target: Target) -> Sample:
        assert (await target.served_model()).name == "fake"
        return Sample({"rate_per_s": 1.0, "wait_s": 1.0})


def visit(server: str, number: int, rate: float, wait_s: float) -> Visit:
    sample = Sample({"rate_per_s": rate, "wait_s": wait_s})
    return Visit(server, number, 0, 3.0, "1.0", {"asked": sample}, {"asked": 2.0}, 5 << 20)


VISITS = [
    *(visit("ours", 0, 6.0, 0.1), visit("theirs", 0, 2.0, 0.4)),
    *(visit("theirs", 1, 2.0, 0.2), visit("ours", 1, 5.0, 0.4)),
    *(visit("ours", 2, 2.0, 0.1), visit("theirs", 2, 2.0, 0.1)),
]


def test_the_order_turns_around_from_round_to_round() -> None:
    assert list(order(3)) == [(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0), (2, 0, 0), (2, 1, 1)]


def test_servers_take_turns_and_never_run_together(tmp_path: pathlib.Path) -> None:
    # Either would fail to start while the other's file is there.
    flags = ("--alone", str(tmp_path / "running"))
    specs = [fake_spec(name, *flags) for name in NAMES]
    steps: list[str] = []
    visits = compare(specs, {"asked": Served()}, tmp_path, num_rounds=2, logs=tmp_path, tell=steps.append)
    assert [(each.server, each.round, each.position) for each in visits] == [
        *(("ours", 0, 0), ("theirs", 0, 1), ("theirs", 1, 0), ("ours", 1, 1)),
    ]
    assert {each.version for each in visits} == {"7.7"}
    assert all(each.ready_s > 0 and each.rss_bytes > 0 and each.cpu_s["asked"] >= 0 for each in visits)
    assert steps[0] == "round 1 of 2: ours: starting"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("1-ours.log", "1-theirs.log", "2-ours.log", "2-theirs.log"),
    ]


def test_a_server_that_does_not_come_up_ends_the_comparison(tmp_path: pathlib.Path) -> None:
    specs = [fake_spec("ours"), fake_spec("theirs", "--no-such-flag")]
    with pytest.raises(UnavailableError, match=r"theirs: ended with exit status 2[\s\S]*--no-such-flag"):
        compare(specs, {"asked": Served()}, tmp_path, num_rounds=1, logs=tmp_path)


def test_ratios_are_of_rounds_and_above_one_where_the_first_is_better() -> None:
    rate, wait = advantages(VISITS, NAMES, {"asked": Served()})
    assert (rate.first, rate.second) == ((6.0, 5.0, 2.0), (2.0, 2.0, 2.0))
    assert rate.ratios == [3.0, 2.5, 1.0]
    assert (rate.median, rate.meets_aim) == (2.5, True)
    assert wait.ratios == [pytest.approx(4.0), 0.5, 1.0]
    assert (wait.median, wait.meets_aim) == (1.0, None)
    assert rate.to_json() == {
        "first": [6.0, 5.0, 2.0],
        "second": [2.0, 2.0, 2.0],
        "ratios": [3.0, 2.5, 1.0],
        "ratio_median": 2.5,
        "ratio_min": 1.0,
        "ratio_max": 3.0,
        "aim": 2.0,
        "limit": None,
        "meets_aim": True,
    }


def test_a_server_that_reached_nothing_has_no_ratio() -> None:
    visits = [visit("ours", 0, 1.0, 1.0), visit("theirs", 0, 0.0, 1.0)]
    rate, _ = advantages(visits, NAMES, {"asked": Served()})
    assert rate.to_json()["ratio_median"] is None
    assert rate.meets_aim


def test_tables_say_pass_or_miss() -> None:
    met = advantages(VISITS, NAMES, {"asked": Served()})
    asked, costs = summarize(met, VISITS, NAMES)
    assert list(asked.rows) == [
        ("rate", "5", "2", "2.50", "1.00-3.00", ">= 2 x", "pass"),
        ("wait, ms", "100", "200", "1.00", "0.50-4.00", "", ""),
    ]
    assert list(costs.rows) == [("ours 1.0", "3.0", "2.0", "5"), ("theirs 1.0", "3.0", "2.0", "5")]
    missed = advantages(VISITS, ("theirs", "ours"), {"asked": Served()})
    assert summarize(missed, VISITS, NAMES)[0].rows[0][-1] == "miss"


def test_the_plot_has_every_round_of_every_metric() -> None:
    figure = draw(advantages(VISITS, NAMES, {"asked": Served()}), NAMES, title="ours and theirs")
    assert [[np.asarray(line.get_ydata()).tolist() for line in axes.lines] for axes in figure.axes] == [
        [[6.0, 5.0, 2.0], [2.0, 2.0, 2.0]],
        [[100.0, 400.0, 100.0], [400.0, 200.0, 100.0]],
    ]


def test_the_command_compares(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mix = Mix(stream_output_tokens=32, alone_s=0.3)
    monkeypatch.setattr("bench.compare.SCENARIOS", {"interference": InterferenceScenario(mix)})
    (tmp_path / "config.json").write_text('{"vocab_size": 500}')
    command = shlex.join([sys.executable, str(FAKE_SERVER), "{port}"])
    result = CliRunner().invoke(
        bench,
        [
            *("compare", "--model", str(tmp_path), "--server", f"ours={command}", "--server", f"theirs={command}"),
            *("--scenario", "interference", "--rounds", "1", "--share", "0.5"),
            *("--output", str(tmp_path / "out.json"), "--plot", str(tmp_path / "plot.png")),
        ],
        catch_exceptions=False,
    )
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["parameters"]["servers"]["ours"].endswith("'{port}'")
    assert [visit["server"] for visit in report["results"]["visits"]] == ["ours", "theirs"]
    p99 = report["results"]["advantages"]["interference"]["loaded_itl_p99_s"]
    assert p99["ratios"] == [p99["second"][0] / p99["first"][0]]
    assert (tmp_path / "plot.png").stat().st_size > 0
    assert (tmp_path / "plot-timeline.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--server", "a=x"], "must be given twice, with two names"),
        (["--server", "a=x", "--server", "a=y"], "must be given twice, with two names"),
        (["--server", "a=x", "--server", "vllm"], "needs --peer-python"),
        (["--server", "a=x", "--server", "b=y"], "no checkpoint whose config.json tells vocab_size"),
    ],
)
def test_what_cannot_be_compared_is_refused(arguments: list[str], problem: str, tmp_path: pathlib.Path) -> None:
    result = CliRunner().invoke(bench, ["compare", "--model", str(tmp_path), *arguments])
    assert result.exit_code == 2
    assert problem in result.output
