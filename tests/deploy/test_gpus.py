"""Worker processes of one machine share its GPUs out."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Literal

import pytest

from baton.config import ModelConfig, WorkerConfig
from deploy.runtimes.gpus import GpuDealer, visible_gpus

NOWHERE = pathlib.Path("/nonexistent")


def worker(name: str, device: Literal["auto", "cpu", "cuda"] = "auto") -> WorkerConfig:
    return WorkerConfig(role="prefill", name=name, epoch=1, model=ModelConfig(path="m", device=device))


def dealt(dealer: GpuDealer, *names: str) -> list[Mapping[str, str]]:
    return [dealer.environment(worker(name)) for name in names]


def test_each_worker_takes_the_next_gpu() -> None:
    dealer = GpuDealer({"CUDA_VISIBLE_DEVICES": "4, GPU-ab"}, NOWHERE)
    first, second = {"CUDA_VISIBLE_DEVICES": "4"}, {"CUDA_VISIBLE_DEVICES": "GPU-ab"}
    assert dealt(dealer, "prefill-0", "decode-0", "decode-1") == [first, second, first]


def test_a_replacement_takes_the_gpu_of_the_worker_before_it() -> None:
    dealer = GpuDealer({"CUDA_VISIBLE_DEVICES": "0,1"}, NOWHERE)
    before = dealt(dealer, "prefill-0", "decode-0")
    assert dealt(dealer, "decode-0", "prefill-0") == before[::-1]


@pytest.mark.parametrize("environ", [{}, {"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": "3"}])
def test_without_a_choice_nothing_is_set(environ: dict[str, str]) -> None:
    assert dealt(GpuDealer(environ, NOWHERE), "prefill-0", "decode-0") == [{}, {}]


def test_workers_on_cpus_take_none() -> None:
    dealer = GpuDealer({"CUDA_VISIBLE_DEVICES": "0,1"}, NOWHERE)
    assert dealer.environment(worker("prefill-0", "cpu")) == {}
    assert dealer.environment(worker("decode-0", "cuda")) == {"CUDA_VISIBLE_DEVICES": "0"}


def test_where_nobody_chose_all_are_shared_out(tmp_path: pathlib.Path) -> None:
    for name in ("nvidia2", "nvidia5", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert visible_gpus({}, tmp_path) == ["0", "1"]
    assert visible_gpus({}, NOWHERE) == []
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "1,-1,0"}, tmp_path) == ["1"]
