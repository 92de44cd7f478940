"""What every cluster is measured against: greedy generation by `transformers` in float32."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM

from tests.engine.checkpoints import VOCAB_SIZE


class Oracle:
    """One checkpoint, run eagerly."""

    def __init__(self, path: pathlib.Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")

    def generate(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """Token ids that follow the prompt, up to and including EOS."""
        ids = torch.tensor([list(prompt)])
        output = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False
        )
        generated: list[int] = output[0, len(prompt) :].tolist()
        return generated


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """Random token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed * 10_000 + length)
    ids: list[int] = torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()
    return ids
