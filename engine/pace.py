"""How far the host may run ahead of a GPU."""

from __future__ import annotations

import collections

import torch

from engine.staging import sleeping_event


class Pace:
    """Around each launch of a step: it begins once all but the last step before are through.

    So the GPU has the next step when it ends one, and the host decides on a step no earlier than it must.
    """

    def __init__(self) -> None:
        # Ends of the last two steps.
        self._ends: collections.deque[torch.cuda.Event] = collections.deque(maxlen=2)

    def __enter__(self) -> None:
        if len(self._ends) == 2:
            self._ends[0].synchronize()

    def __exit__(self, *_: object) -> None:
        end = sleeping_event()
        end.record()
        self._ends.append(end)
