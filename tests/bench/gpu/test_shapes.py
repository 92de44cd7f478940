"""What the GPU benchmark measures, as far as that can be told without one."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner

from bench.gpu import peers, shapes
from bench.gpu.__main__ import command
from bench.gpu.attention import difference
from bench.gpu.tuner import decode_tiles, prefill_tiles, row
from bench.kernels import Call, Shape
from engine.attention import make_backend
from engine.kernels.tiles import AttentionTile
from engine.kv.layout import KVGroup, KVLayout


def test_calls_are_those_whose_keys_and_values_fit() -> None:
    found = set(shapes.fitting(shapes.DECODES, shapes.layout(64), 40 << 30))
    assert Shape(1, 1, 131072) in found
    assert Shape(64, 1, 131072) in found
    assert Shape(256, 1, 65536) not in found


@pytest.mark.parametrize("shape", [Shape(3, 1, 21), Shape(2, 16, 16)])
def test_torch_computes_the_same_call(shape: Shape) -> None:
    """On the CPU: the gathered keys and values are those of the pages."""
    call = Call.make(KVLayout((KVGroup((0,)),), 2, 16, 8, torch.float32), shape, 4)
    run = peers.prepared("torch SDPA", call)
    assert run is not None
    assert difference(run(), call.run(make_backend("reference", torch.device("cpu")))) < 1e-6


def test_torch_is_left_out_where_its_fused_kernels_take_no_mask() -> None:
    assert peers.sdpa(Call.make(KVLayout((KVGroup((0,)),), 1, 16, 8, torch.float32), Shape(1, 4, 8), 1)) is None


def test_libraries_that_are_missing_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.PEERS, "FlashInfer", lambda call: __import__("no_such_library"))
    call = Call.make(KVLayout((KVGroup((0,)),), 1, 16, 8, torch.float32), Shape(1, 1, 8), 1)
    assert peers.prepared("FlashInfer", call) is None


def test_the_tuner_prints_rows_of_the_table() -> None:
    assert row("_ANY", 128, AttentionTile(128, 64, 8, 3, descriptors=True)) == (
        "Row(_ANY, 128, 2, AttentionTile(128, 64, 8, 3, descriptors=True)),"
    )
    assert all(tile.rows == 16 for tile in decode_tiles())
    assert len(set(prefill_tiles())) == len(list(prefill_tiles()))


def test_says_that_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(command, [])
    assert result.exit_code == 1
    assert "there is no GPU here" in result.output
