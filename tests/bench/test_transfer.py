"""`baton bench transfer` on small pools: it moves what it says, and reports what it measured."""

from __future__ import annotations

import json
import os
import pathlib

import pytest
from click.testing import CliRunner

from bench import ceilings, transfer
from bench.cli import bench
from bench.cores import halves, on_cores
from bench.transfer import Result, overlap_table, transfer_table
from bench.transfer_overlap import Overlap


def test_the_report_has_every_transport(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "TRANSPORTS", ("shm",))
    monkeypatch.setattr(ceilings, "COPY_BYTES", 1 << 20)
    output = tmp_path / "transfer.json"
    done = CliRunner().invoke(bench, ["transfer", "--tokens", "33", "--rounds", "2", "--output", str(output)])
    assert done.exit_code == 0, done.output
    assert "shm" in done.output
    report = json.loads(output.read_text())
    assert report["parameters"] == {"tokens": 33, "rounds": 2, "dtype": "float32", "overlap": False}
    prompt, block = report["results"]["prompt"]["shm"], report["results"]["block"]["shm"]
    # 12 layers, keys and values of 4 heads of 64, in float32; 33 tokens take three blocks of 16.
    assert (prompt["num_bytes"], block["num_bytes"]) == (3 * 12 * 2 * 4 * 64 * 16 * 4, 12 * 2 * 4 * 64 * 16 * 4)
    assert len(prompt["seconds"]) == 2
    assert prompt["sender_cpu_s"] > 0
    assert report["results"]["bare_grpc_bytes_per_s"] > 0


def test_rates_are_those_of_the_median() -> None:
    result = Result((0.02, 0.01, 0.5), first_s=1.0, num_bytes=10**8, sender_cpu_s=0.06, receiver_cpu_s=0.03)
    table = transfer_table({"shm": result}, {"shm": result}, 10e9, 1.5e9)
    assert table.title == "100.0 MB between two processes; a plain copy makes 10.0 GB/s, bare gRPC 1.50"
    assert table.rows == [("shm", "20.0", "1000.0", "5.00", "50%", "0.20", "0.10", "20.00")]


def test_what_is_exposed_is_a_share_of_the_prefill_alone() -> None:
    table = overlap_table({"shm": Overlap(alone_s=2.0, pushing_s=2.1, exposed_s=0.03)}, 2048)
    assert table.rows == [("shm", "2000", "2100", "30.0", "1.5%", "+6.5%")]


@pytest.mark.parametrize(
    ("cores", "ours", "theirs"), [({3, 1, 2, 0}, [0, 1], [2, 3]), ({5, 7, 6}, [5], [6, 7]), ({4}, [4], [4])]
)
def test_each_process_has_half_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: set[int], ours: list[int], theirs: list[int]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores)
    assert halves() == (ours, theirs)


def test_what_was_kept_to_some_cores_gets_all_of_them_back() -> None:
    before = os.sched_getaffinity(0)
    with on_cores({max(before)}):
        assert os.sched_getaffinity(0) == {max(before)}
    assert os.sched_getaffinity(0) == before
