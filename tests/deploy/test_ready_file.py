"""The file that scripts wait for."""

from __future__ import annotations

import json
import pathlib

from baton.internal.v1 import worker_pb2
from deploy.ready_file import ReadyFile
from deploy.router_process import RouterAddresses

ADDRESSES = RouterAddresses(grpc="127.0.0.1:5", http="http://127.0.0.1:6")


def test_it_names_the_router_and_every_worker(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "ready.json"
    worker = worker_pb2.WorkerInfo(
        role="decode",
        name="decode-0",
        epoch=2,
        pid=7,
        address="127.0.0.1:8",
        metrics_address="http://127.0.0.1:9/metrics",
    )
    ReadyFile(str(path)).write(ADDRESSES, [worker])
    assert json.loads(path.read_text()) == {
        "grpc": "127.0.0.1:5",
        "http": "http://127.0.0.1:6",
        "workers": [
            {
                "role": "decode",
                "name": "decode-0",
                "pid": 7,
                "address": "127.0.0.1:8",
                "metrics": "http://127.0.0.1:9/metrics",
            }
        ],
    }


def test_it_is_replaced_whole_and_nothing_else_is_left(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "ready.json"
    ready = ReadyFile(str(path))
    ready.write(ADDRESSES, [])
    with path.open() as reader:
        ready.write(ADDRESSES, [worker_pb2.WorkerInfo(name="decode-0")])
        assert json.load(reader)["workers"] == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["ready.json"]


def test_what_an_earlier_run_left_goes_at_once(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "ready.json"
    path.write_text("old")
    ready = ReadyFile(str(path))
    assert not path.exists()
    ready.remove()
