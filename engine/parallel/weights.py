"""Reads one rank's shard of a checkpoint: of a tensor that is cut only the rank's part leaves the file."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open

from engine.parallel.plan import ShardPlan, generic, rows_of_vocabulary

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def read_shard(
    folder: pathlib.Path, plan: ShardPlan, *, rank: int, size: int, vocab_size: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The parameters of a rank's model by name, in host memory.

    Raises:
        ValueError: a tensor cannot be cut so; names it.
        OSError: a file cannot be read.
    """
    shard = {}
    for file in _files(folder):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                shard[name] = _part(stored, name, plan, rank, size, vocab_size).to(dtype)
    return shard


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The weights' files, as transformers finds them: a folder may hold others."""
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    index: Mapping[str, Mapping[str, str]] = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    return [folder / name for name in sorted(set(index["weight_map"].values()))]


def _part(stored: Any, name: str, plan: ShardPlan, rank: int, size: int, vocab_size: int) -> torch.Tensor:
    """A rank's part of one tensor of an open file."""
    kind = generic(name)
    tensor = stored.get_slice(name)
    shape = tensor.get_shape()
    if kind in plan.first_rank_only and rank > 0:
        return torch.zeros(shape)
    dimension = plan.dimensions.get(kind)
    if dimension is None:
        whole: torch.Tensor = stored.get_tensor(name)
        return whole
    length = shape[dimension]
    if kind.rpartition(".")[0] in (plan.embedding, plan.head):
        if length != vocab_size:
            raise ValueError(f"{name} has {length} rows, but the vocabulary {vocab_size}")
        each = rows_of_vocabulary(length, size)
    elif length % size:
        raise ValueError(f"tensor_parallel_size: {size} does not divide {name}, {shape}")
    else:
        each = length // size
    start, stop = min(rank * each, length), min((rank + 1) * each, length)
    part: torch.Tensor = tensor[(slice(None),) * dimension + (slice(start, stop),)]
    if num_missing := each - (stop - start):
        part = torch.cat([part, part.new_zeros(num_missing, *part.shape[1:])])
    return part
