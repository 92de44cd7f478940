"""Each part of the GPU benchmark, on the CPU and in small: it measures what it says, and what it reports adds up."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from bench import ceilings, transfer
from bench.checkpoint import Sizes, make_model
from bench.gpu import __main__, attention, serving, steps
from bench.gpu.__main__ import command
from bench.gpu.scale import FULL, TINY
from bench.gpu.stand import Found, Stand
from bench.transfer import Result
from deploy.cli import commands
from tests.bench.conftest import fake_spec


def run(tmp_path: pathlib.Path, *parts: str) -> Any:
    """What the command writes of these parts."""
    output = tmp_path / "gpu.json"
    only = [word for part in parts for word in ("--only", part)]
    done = CliRunner().invoke(command, ["--device", "cpu", "--folder", str(tmp_path), *only, "--output", str(output)])
    assert done.exit_code == 0, done.output
    assert not list(tmp_path.glob("baton-bench-*"))
    return json.loads(output.read_text())


@pytest.fixture(autouse=True)
def _small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(ceilings, "_SIZES", (64,))


def test_attention_and_steps_are_put_beside_what_the_device_can_do(tmp_path: pathlib.Path) -> None:
    report = run(tmp_path, "attention", "steps")
    assert report["name"] == "gpu"
    found = report["results"]
    calls = found["attention"]["calls"]
    assert [call["implementation"] for call in calls] == [attention.OURS, "torch SDPA"] * len(TINY.calls)
    assert all(call["error"] is None or call["error"] < 1e-5 for call in calls)
    sizes = TINY.large
    decodes, prefills = found["steps"]["decodes"], found["steps"]["prefills"]
    for decode, batch in zip(decodes, TINY.batches, strict=True):
        # Keys and values of one block of 64 tokens in each layer, in float32.
        assert decode["kv_bytes"] == batch * sizes.num_layers * 2 * sizes.num_kv_heads * 32 * 64 * 4
        num_bytes = decode["weight_bytes"] + decode["kv_bytes"]
        assert decode["ratio"] == pytest.approx(decode["seconds"] / (num_bytes / found["copy_bytes_per_s"]))
    for prefill, chunk in zip(prefills, TINY.chunks, strict=True):
        assert (prefill["tokens"], prefill["chunk"]) == (TINY.prompt_tokens, chunk)
        assert prefill["share"] == pytest.approx(prefill["flops"] / prefill["seconds"] / found["gemm_flops_per_s"])


def test_transfers_are_measured_alone_and_beside_a_prefill(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is what tests/bench/test_transfer.py has."""
    alone = Result((0.1,), first_s=0.1, num_bytes=10**6, sender_cpu_s=0.1, receiver_cpu_s=0.1)
    monkeypatch.setattr(transfer, "measure", lambda *_: (alone, alone))
    found = run(tmp_path, "transfers")["results"]["transfers"]
    assert found["prompt"]["shm"]["num_bytes"] == 10**6
    assert min(found["overlap"]["shm"].values()) > 0


def test_a_server_is_put_beside_transformers(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "server", lambda _: fake_spec("fake"))
    found = run(tmp_path, "serving")["results"]["serving"]
    assert set(found["output_tokens_per_s"]) == {"baton", "generate_batch", "generate"}
    assert min(found["output_tokens_per_s"].values()) > 0
    assert found["interference"]["itl_p99_ratio"] > 0


def test_the_server_takes_its_flags(tmp_path: pathlib.Path) -> None:
    spec = serving.server(Stand(torch.device("cuda", 0), FULL, tmp_path, 64, 1.0, 1.0))
    words = spec.words(tmp_path, 8000)
    result = CliRunner().invoke(commands.main, [*words[words.index("serve") :], "--print-config"])
    assert result.exit_code == 0, result.output
    config = yaml.safe_load(result.stdout)
    assert config["model"]["device"] == "cuda"
    assert config["decode"]["max_batch_seqs"] == FULL.load.concurrency
    assert config["cache"] == config["cache"] | {"block_size": 64, "kv_cache_bytes": FULL.kv_cache_bytes}


def test_weights_and_products_are_those_of_the_model() -> None:
    sizes = Sizes(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=48,
        vocab_size=1024,
        max_model_len=64,
    )
    linears = [module for module in make_model(sizes, 0).modules() if isinstance(module, torch.nn.Linear)]
    *layers, head = (linear.weight.numel() for linear in linears)
    assert steps.step_weights(sizes) == sum(layers) + head
    # Two products of 8 for each pair of a query with a key not after it, in 4 heads of each of 2 layers.
    assert steps.prompt_flops(sizes, 3) == 2 * (3 * sum(layers) + head) + 2 * 2 * 8 * 6 * 4 * 2


def test_a_part_that_fails_does_not_take_the_others_along(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(stand: Stand) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(__main__, "PARTS", {"serving": fail, "attention": lambda _: Found([], {"calls": []})})
    output = tmp_path / "gpu.json"
    done = CliRunner().invoke(command, ["--device", "cpu", "--output", str(output)])
    assert done.exit_code == 1
    assert "could not be measured: serving" in done.output
    assert json.loads(output.read_text())["results"]["attention"] == {"calls": []}
