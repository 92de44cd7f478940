"""How logits become weights."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.cpu_kernels.arithmetic import FloatArray


class Rule(NamedTuple):
    """One layer's rule; see `AttentionBackend.attend`. A named tuple, which kernels can take apart.

    Attributes:
        window: keys that a query sees; larger than any context for all.
        softcap: 0 for none.
        sinks: [Hq]; LOWEST for none.
    """

    scale: np.float32
    window: int
    softcap: np.float32
    sinks: FloatArray
