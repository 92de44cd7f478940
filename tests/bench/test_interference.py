"""Which gaps count as alone and which as loaded, and what is sent to find out."""

from __future__ import annotations

import itertools
import json
import pathlib

import numpy as np
import pytest
from click.testing import CliRunner

from baton.errors import UnavailableError
from bench.cli import bench
from bench.interference import Interference, Mix, Observation, draw, summarize
from bench.load.outcome import CANCELLED, Outcome
from bench.load.requests import LoadRequest
from bench.load.runner import LoadRun
from bench.load.targets import ServedModel
from bench.servers import Server

MODEL = ServedModel("fake", vocab_size=1000)
MIX = Mix(num_streams=4, num_long=3, long_input_tokens=50)


def outcome(*token_times_s: float, error: str | None = None, ended_s: float | None = None) -> Outcome:
    found = Outcome(LoadRequest([1], 2), scheduled_s=0.0, error=error, ended_s=ended_s)
    for at_s in token_times_s:
        found.add_tokens(at_s, 1)
    return found


def run(*outcomes: Outcome, started_s: float = 0.0) -> LoadRun:
    return LoadRun(list(outcomes), started_s, 20.0, interrupted=True)


@pytest.fixture
def observation() -> Observation:
    """Long prompts from 10 to 14; the streams are all under way from 2 on."""
    streams = run(
        # Before both had begun; alone; alone; across the arrival; loaded; across the end; after the end.
        outcome(1.0, 1.5, 3.0, 5.0, 11.0, 13.5, 17.0, 18.0, error=CANCELLED, ended_s=20.0),
        outcome(2.0, 3.0, ended_s=3.0),
        # The time between two answers of a stream is no gap.
        outcome(4.0, 4.5, error=CANCELLED, ended_s=20.0),
    )
    long_prompts = run(outcome(11.0, ended_s=12.0), outcome(13.0, ended_s=14.0), started_s=10.0)
    return Observation.of(streams, long_prompts, num_streams=2)


def test_gaps_count_where_they_lie(observation: Observation) -> None:
    assert (observation.alone_s, observation.loaded_s) == ((2.0, 10.0), (10.0, 14.0))
    found = Interference.of(observation)
    assert (found.alone.count, found.alone.max) == (3, 2.0)
    assert (found.loaded.count, found.loaded.p50, found.loaded.max) == (3, 3.5, 6.0)
    assert (found.alone_s, found.loaded_s) == (8.0, 4.0)


def test_the_result_has_the_ratio_and_each_long_prompt(observation: Observation) -> None:
    found = Interference.of(observation)
    assert found.p99_ratio == found.loaded.p99 / found.alone.p99
    assert (found.long_ttft_s, found.long_ttft_p50_s) == ([11.0, 13.0], 12.0)
    streams, long_prompts = summarize(found)
    assert [row[0] for row in streams.rows] == ["alone", "with long prompts", "ratio"]
    assert streams.rows[1][1:] == ("3500.0", f"{found.loaded.p99 * 1e3:.1f}", "6000.0", "3", "4.0")
    assert streams.rows[2][1] == "3.50"
    assert list(long_prompts.rows) == [("1", "11.00"), ("2", "13.00"), ("median", "12.00")]
    json.dumps(found.to_json(), allow_nan=False)


def test_a_timeline_has_a_row_for_each_server(observation: Observation) -> None:
    calm = Observation([outcome(1.0, 2.0)], observation.long_prompts, observation.alone_s, observation.loaded_s)
    figure = draw({"calm": calm, "a": observation}, title="both")
    assert [len(axes.patches) for axes in figure.axes] == [4, 4]
    assert [np.size(line.get_xdata()) for axes in figure.axes for line in axes.lines] == [1, 9]
    assert all(axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 6000 for axes in figure.axes)


def test_streams_that_were_late_or_too_few_tokens_are_told() -> None:
    long_prompts = run(outcome(11.0, ended_s=12.0), started_s=10.0)
    late = run(outcome(1.0, 2.0, ended_s=2.0), outcome(10.5, 11.0, ended_s=11.0))
    with pytest.raises(UnavailableError, match="not all begun when the first long prompt was due; use --alone-s"):
        Observation.of(late, long_prompts, num_streams=2)
    quiet = run(outcome(1.0, 11.0, ended_s=11.0))
    with pytest.raises(UnavailableError, match="too few tokens"):
        Interference.of(Observation.of(quiet, long_prompts, num_streams=1))


def test_the_streams_end_at_different_times_and_go_on() -> None:
    lengths = [request.max_tokens for request in itertools.islice(MIX.streams(MODEL), 7)]
    assert lengths == [64, 128, 192, 256, 256, 256, 256]
    assert {len(request.prompt) for request in itertools.islice(MIX.streams(MODEL), 7)} == {64}


def test_long_prompts_come_at_an_interval() -> None:
    requests = list(MIX.long_prompts(MODEL))
    assert [request.arrival_s for request in requests] == [0.0, 0.8, 1.6]
    assert {(len(request.prompt), request.max_tokens) for request in requests} == {(50, 32)}


def test_the_same_seed_sends_the_same_and_no_prompt_twice() -> None:
    def prompts(mix: Mix) -> list[tuple[object, ...]]:
        sent = (*mix.warm_up_requests(MODEL), *itertools.islice(mix.streams(MODEL), 6), *mix.long_prompts(MODEL))
        return [tuple(request.prompt) for request in sent]

    assert prompts(MIX) == prompts(MIX)
    assert not set(prompts(MIX)) & set(prompts(Mix(num_streams=4, num_long=3, long_input_tokens=50, seed=1)))
    beginnings = {prompt[:8] for prompt in prompts(MIX)}
    assert len(beginnings) == 2 + 6 + 3


def test_chats_are_sent_as_chats() -> None:
    request = next(Mix(api="chat").long_prompts(MODEL))
    assert request.prompt[0]["role"] == "user"  # type: ignore[index]
    assert request.arrival_s == 0.0


FLAGS = "--streams 3 --stream-output-tokens 40 --alone-s 0.3 --long-prompts 2 --long-output-tokens 4 --interval-s 0.05"


def test_the_command_measures_a_server(fake_server: Server, tmp_path: pathlib.Path) -> None:
    arguments = [*FLAGS.split(), "--output", str(tmp_path / "out.json"), "--plot", str(tmp_path / "plot.html")]
    result = CliRunner().invoke(
        bench, ["interference", "--target", fake_server.url, *arguments], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    assert "with long prompts" in result.output
    report = json.loads((tmp_path / "out.json").read_text())
    assert (report["name"], report["parameters"]["num_long"]) == ("interference", 2)
    assert report["results"]["alone"]["count"] > 0
    assert report["results"]["loaded"]["count"] > 0
    assert len(report["results"]["long_ttft_s"]) == 2
    assert "data:image/png" in (tmp_path / "plot.html").read_text()


def test_a_request_that_fails_ends_it(fake_server: Server) -> None:
    arguments = ["interference", "--target", fake_server.url, *FLAGS.split(), "--long-input-tokens", "13"]
    result = CliRunner().invoke(bench, arguments)
    assert result.exit_code == 1
    assert "no such length" in result.output
