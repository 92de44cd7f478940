"""Worker processes of one machine share its GPUs out."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Literal

import pytest

from baton.config import ModelConfig, PrefillConfig, WorkerConfig
from deploy.runtimes.gpus import GpuDealer, visible_gpus

NOWHERE = pathlib.Path("/nonexistent")


def worker(name: str, device: Literal["auto", "cpu", "cuda"] = "auto", ranks: int = 1) -> WorkerConfig:
    prefill = PrefillConfig(tensor_parallel_size=ranks)
    return WorkerConfig(role="prefill", name=name, epoch=1, model=ModelConfig(path="m", device=device), prefill=prefill)


def dealt(dealer: GpuDealer, *names: str) -> list[Mapping[str, str]]:
    return [dealer.environment(worker(name)) for name in names]


def test_each_worker_takes_the_next_gpu() -> None:
    dealer = GpuDealer({"CUDA_VISIBLE_DEVICES": "4, GPU-ab"}, NOWHERE)
    first, second = {"CUDA_VISIBLE_DEVICES": "4"}, {"CUDA_VISIBLE_DEVICES": "GPU-ab"}
    assert dealt(dealer, "prefill-0", "decode-0", "decode-1") == [first, second, first]


def test_each_rank_of_a_worker_takes_one() -> None:
    dealer = GpuDealer({"CUDA_VISIBLE_DEVICES": "0,1,2"}, NOWHERE)
    dealt = [dealer.environment(worker(f"prefill-{index}", ranks=2))["CUDA_VISIBLE_DEVICES"] for index in (0, 1, 0)]
    assert dealt == ["0,1", "2,0", "0,1"]


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


@pytest.mark.parametrize(
    ("gpus", "num_ranks", "share"), [("", 2, 0.45), ("0", 1, 0.9), ("0,1", 2, 0.9), ("0,1", 3, 0.45), ("0", 3, 0.3)]
)
def test_workers_on_one_gpu_have_equal_parts_of_its_memory(gpus: str, num_ranks: int, share: float) -> None:
    """As if there were one GPU, where none is found: CUDA may know better."""
    dealer = GpuDealer({"CUDA_VISIBLE_DEVICES": gpus}, NOWHERE, num_ranks=num_ranks)
    assert dealer.limit_memory(worker("prefill-0")).cache.gpu_memory_utilization == pytest.approx(share)


def test_where_nobody_chose_all_are_shared_out(tmp_path: pathlib.Path) -> None:
    for name in ("nvidia2", "nvidia5", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert visible_gpus({}, tmp_path) == ["0", "1"]
    assert visible_gpus({}, NOWHERE) == []
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "1,-1,0"}, tmp_path) == ["1"]
