"""A tiny checkpoint, served by a model runner over a shuffled pool, next to what transformers computes for it."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from baton.config import ModelConfig
from engine.attention import AttentionBackend, make_backend
from engine.batch import BatchItem
from engine.model_loader import LoadedModel, load_model
from engine.model_runner import ModelRunner


class PagedModel:
    """Runs sequences in chunks over a pool that is NaN wherever nothing was written."""

    def __init__(
        self,
        path: pathlib.Path,
        backend: str,
        block_size: int,
        num_blocks: int = 200,
        *,
        batch_invariant: bool = False,
        **model: Any,
    ) -> None:
        """`backend` may be "triton" without a GPU where tests have its kernels interpreted."""
        on_gpu = backend == "triton" and torch.cuda.is_available()
        loaded = load_model(ModelConfig(path=str(path), device="cuda" if on_gpu else "cpu", **model))
        self.model: LoadedModel = loaded.fuse(backend, batch_invariant=batch_invariant)
        self.layout = self.model.layout(block_size)
        shape, device = self.layout.pool_shape(num_blocks), self.model.device
        self.kv = torch.full(shape, float("nan"), dtype=self.layout.dtype, device=device)
        if backend == "triton":
            from engine.attention.triton import TritonAttention

            attention: AttentionBackend = TritonAttention(batch_invariant=batch_invariant)
        else:
            attention = make_backend(backend, device)
        self.runner = ModelRunner(self.model, self.layout, self.kv, attention)
        order = torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(block_size)) + 1
        self._free = order.tolist()

    def new_tables(self, num_tokens: int) -> list[list[int]]:
        """Fresh blocks for a sequence of so many tokens, for each group."""
        count = self.layout.num_blocks(num_tokens)
        return [[self._free.pop() for _ in range(count)] for _ in self.layout.groups]

    def spoil(self, block_ids: Sequence[int]) -> None:
        """Fill blocks with NaN."""
        self.kv[:, list(block_ids)] = float("nan")

    def free_passed(self, tables: list[list[int]], computed: int) -> None:
        """Give back, poison and forget the blocks that the windows have passed once `computed` tokens are."""
        for group, row in zip(self.layout.groups, tables, strict=True):
            for ordinal in range(group.first_visible(computed) // self.layout.block_size):
                if row[ordinal]:
                    self.spoil([row[ordinal]])
                    self._free.insert(0, row[ordinal])
                    row[ordinal] = 0

    def logits(
        self, prompts: Sequence[Sequence[int]], chunks: Sequence[int], on_layer: Callable[[int], None] | None = None
    ) -> list[torch.Tensor]:
        """Logits of every position of every prompt; prompt i is computed chunks[i] tokens a step, all side by side."""
        tables = [self.new_tables(len(prompt)) for prompt in prompts]
        rows: list[list[torch.Tensor]] = [[] for _ in prompts]
        num_steps = max(-(-len(prompt) // size) for prompt, size in zip(prompts, chunks, strict=True))
        for step in range(num_steps):
            parts = {
                index: prompt[step * size : (step + 1) * size]
                for index, (prompt, size) in enumerate(zip(prompts, chunks, strict=True))
                if step * size < len(prompt)
            }
            items = [BatchItem(part, step * chunks[i], tables[i], len(part)) for i, part in parts.items()]
            out = self.runner.execute(items, on_layer).cpu()
            for index, part in parts.items():
                rows[index].append(out[: len(part)])
                out = out[len(part) :]
                self.free_passed(tables[index], step * chunks[index] + len(part))
            assert not len(out)
        return [torch.cat(pieces) for pieces in rows]

    def greedy(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """Greedy continuations: one step of prefill for all prompts, then decodes."""
        tables = [self.new_tables(len(prompt) + num_tokens) for prompt in prompts]
        outputs: list[list[int]] = [[] for _ in prompts]
        for _ in range(num_tokens):
            items = [
                BatchItem(output[-1:], len(prompt) + len(output) - 1, table, 1)
                if output
                else BatchItem(prompt, 0, table, 1)
                for prompt, output, table in zip(prompts, outputs, tables, strict=True)
            ]
            for item, output, table, token in zip(
                items, outputs, tables, self.runner.execute(items).argmax(-1).tolist(), strict=True
            ):
                output.append(token)
                self.free_passed(table, item.start + len(item.token_ids))
        return outputs


def transformers_model(path: pathlib.Path) -> Any:
    """The checkpoint as transformers runs it by itself, without our attention."""
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()


@torch.inference_mode()
def transformers_logits(model: Any, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Logits of every position of every prompt, one full forward each."""
    return [model(torch.tensor([list(prompt)])).logits[0] for prompt in prompts]


@torch.inference_mode()
def transformers_greedy(model: Any, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """What `generate` continues each prompt with."""
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        generated = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
        )
        outputs.append(generated[0, len(prompt) :].tolist())
    return outputs
