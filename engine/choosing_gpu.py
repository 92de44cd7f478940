"""Chooses tokens from logits on a GPU, and leaves them there: nothing here waits for it.

`engine.sampling` says by which rules; `engine.kernels.sampling` draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.kernels.sampling import choose as choose_rows
from engine.sampling_state import SamplingState
from engine.staging import to_device

# The sign aside, the bits of a float32.
_MAGNITUDE = 0x7FFFFFFF
_LAST_ID = 0xFFFFFFFF


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """See `engine.choosing_cpu.argmax`."""
    return logits.argmax(-1)


def choose(logits: torch.Tensor, rows: Sequence[int], states: Sequence[SamplingState]) -> torch.Tensor:
    """See `engine.choosing_cpu.choose`."""
    count = len(states)
    index, temperature, top_k, top_p, min_p, seeds, streams, positions = to_device(
        [
            np.asarray(rows, np.int64),
            np.fromiter((0.0 if state.greedy else state.params.temperature for state in states), np.float32, count),
            np.fromiter((state.params.top_k for state in states), np.int32, count),
            np.fromiter((state.params.top_p for state in states), np.float64, count),
            np.fromiter((state.params.min_p for state in states), np.float32, count),
            np.fromiter((state.seed for state in states), np.uint64, count).view(np.int64),
            np.fromiter((state.choice for state in states), np.int64, count),
            np.fromiter((state.next_position for state in states), np.int64, count),
        ],
        logits.device,
    )
    token_ids = choose_rows(
        logits if count == len(logits) else logits[index],
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seeds=seeds,
        streams=streams,
        positions=positions,
    )
    return token_ids.long()


def ranked(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See `engine.choosing_cpu.ranked`.

    `torch.topk` leaves open which of several equal logits it returns, and bfloat16 models make equal logits often: so
    it ranks numbers of 64 bits, the logit's order above and the reverse of the id below.
    """
    # Adding zero makes of minus zero the zero that it equals.
    bits = (logits + 0.0).view(torch.int32).long()
    order = torch.where(bits < 0, bits ^ _MAGNITUDE, bits)
    ids = torch.arange(logits.shape[1], device=logits.device)
    keys = (order << 32) | (_LAST_ID - ids)
    top_ids = _LAST_ID - (keys.topk(k).values & _LAST_ID)
    return logits.gather(-1, top_ids), top_ids
