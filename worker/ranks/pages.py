"""What a step of a prefill worker sends while it is computed: the same in all ranks, of each rank's own heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Protocol

from baton.internal.v1 import ranks_pb2


class PageSink(Protocol):
    """A push, as whoever has computed its pages sees it."""

    def send(self, group: int, slot: int, first_block: int, block_ids: Sequence[int]) -> None:
        """As of `kvtransfer.push.Push`."""


@dataclasses.dataclass(frozen=True, slots=True)
class PageRun:
    """Logical blocks of one push from `first_block` on.

    Attributes:
        number: names the push to the other ranks.
        blocks: for each group the pool's blocks.
    """

    push: PageSink
    number: int
    first_block: int
    blocks: Sequence[Sequence[int]]

    def send(self, locations: Iterable[tuple[int, int]]) -> None:
        """Sends the blocks' pages at each (group, slot)."""
        for group, slot in locations:
            self.push.send(group, slot, self.first_block, self.blocks[group])

    def to_wire(self) -> ranks_pb2.PageRun:
        groups = [ranks_pb2.BlockIds(ids=ids) for ids in self.blocks]
        return ranks_pb2.PageRun(push=self.number, first_block=self.first_block, groups=groups)


class StepPages:
    """Sends each layer's pages of a step as soon as they are computed; given to a runner as its `on_layer`.

    Args:
        locations: the (group, slot) of each layer.
    """

    def __init__(self, runs: Sequence[PageRun], locations: Sequence[tuple[int, int]]) -> None:
        self.runs = runs
        self._locations = locations

    def __call__(self, layer: int) -> None:
        for run in self.runs:
            run.send([self._locations[layer]])
