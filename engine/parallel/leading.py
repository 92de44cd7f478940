"""Rank 0's side of a step: the other ranks begin the same step, then this rank computes its part of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from engine.batch import Batch
from engine.model_runner import ModelRunner


class Followers(Protocol):
    """The other ranks of a worker. They do what they are told in order, and answer nothing."""

    def step(self, batch: Batch, on_layer: Callable[[int], None] | None, chosen: torch.Tensor | None) -> None:
        """Compute a batch; arguments as of `ModelRunner.execute_batch`. What `on_layer` does is done there for their
        own heads."""

    def copy_block(self, source: int, target: int) -> None:
        """Copy a block in all slots of the pool."""

    def spoil(self, block_ids: Sequence[int]) -> None:
        """Fill blocks with NaN."""

    def give_up(self, error: BaseException) -> None:
        """A step failed here that they have begun: from now on the ranks' states differ, and none can go on."""


class LeadingRunner(ModelRunner):
    """The `ModelRunner` of rank 0. What can be wrong with a batch is found when it is built, before any rank begins."""

    def __init__(self, followers: Followers, *args: Any, **kwargs: Any) -> None:
        """`args` and `kwargs` are those of `ModelRunner`."""
        super().__init__(*args, **kwargs)
        self._followers = followers

    @torch.inference_mode()
    def execute_batch(
        self,
        batch: Batch,
        on_layer: Callable[[int], None] | None = None,
        *,
        chosen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        try:
            self._followers.step(batch, on_layer, chosen)
            return super().execute_batch(batch, on_layer, chosen=chosen)
        except BaseException as error:
            self._followers.give_up(error)
            raise
