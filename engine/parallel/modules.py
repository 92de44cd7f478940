"""The modules of a shard at which ranks exchange what they have computed.

Each holds the module that the family has there, of the shard's size, so that what replaces modules by faster ones goes
on to find it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from engine.parallel.group import RankGroup
from engine.parallel.plan import ShardPlan, generic


class Summed(torch.nn.Module):
    """A module whose output is its rank's summand."""

    def __init__(self, inner: torch.nn.Module, group: RankGroup) -> None:
        super().__init__()
        self.inner = inner
        self._group = group

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The sum over the ranks."""
        return self._group.add(self.inner(*args, **kwargs))

    def around(self, inner: torch.nn.Module) -> Summed:
        """The same around another module."""
        return Summed(inner, self._group)


class SplitEmbedding(torch.nn.Module):
    """An embedding of which each rank holds the rows of its part of the vocabulary."""

    def __init__(self, inner: torch.nn.Embedding, group: RankGroup) -> None:
        super().__init__()
        self.inner = inner
        self._group = group
        self._first = group.rank * inner.num_embeddings

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids: int64 [...]; returns [..., hidden], equal on all ranks."""
        rows = token_ids - self._first
        others = (rows < 0) | (rows >= self.inner.num_embeddings)
        own: torch.Tensor = self.inner(rows.masked_fill(others, 0))
        return self._group.add(own.masked_fill(others[..., None], 0))


class SplitHead(torch.nn.Module):
    """An output layer of which each rank computes its part of the vocabulary."""

    def __init__(self, inner: torch.nn.Module, group: RankGroup, vocab_size: int) -> None:
        super().__init__()
        self.inner = inner
        self._group = group
        self._vocab_size = vocab_size

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [..., hidden], equal on all ranks; returns [..., vocab_size]."""
        return self._group.join(self.inner(hidden))[..., : self._vocab_size]


def connect(module: PreTrainedModel, plan: ShardPlan, group: RankGroup, vocab_size: int) -> None:
    """Put exchanging modules, in place, where the plan wants results of all ranks.

    Raises:
        ValueError: the model lacks one of the plan's modules; names it.
    """
    found = {name for name, _ in module.named_modules()}
    wanted = plan.summands | {plan.embedding, plan.head}
    if absent := sorted(wanted - {generic(name) for name in found}):
        raise ValueError(f"tensor_parallel_size: the model has no {absent[0]}, of which its plan speaks")
    for name in sorted(found):
        if (kind := generic(name)) not in wanted:
            continue
        inner: Any = module.get_submodule(name)
        outer: torch.nn.Module
        if kind == plan.embedding:
            outer = SplitEmbedding(inner, group)
        elif kind == plan.head:
            outer = SplitHead(inner, group, vocab_size)
        else:
            outer = Summed(inner, group)
        module.set_submodule(name, outer)
