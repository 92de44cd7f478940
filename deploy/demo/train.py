"""Train the demo model on a corpus generated from a seed, or evaluate a trained one.

The model is a small Llama that recalls, adds, subtracts and tells stories.  Training takes one
CPU thread and about half an hour::

    python -m deploy.demo.train --seed 0 --out deploy/demo/model
    python -m deploy.demo.train --evaluate deploy/demo/model
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from deploy.demo.evaluate import evaluate, load, report
from deploy.demo.hints import Hints
from deploy.demo.rows import BOS, BOS_ID, EOS, EOS_ID, IGNORE, batch, make_tokenizer

LENGTHS = ((0.0, 64), (0.12, 128), (0.22, 256), (0.36, 512), (0.6, 1024), (0.8, 1536))
"""From which part of the training on rows of how many tokens are used."""

HINTS_UNTIL = 0.2
"""The part of the training during which the two hints are given."""

NAMING_LAYER = 1
"""How many layers there are below the output that names keys."""

POINTING_LAYER = 2
"""Which layer, from 0, looks at the digit to repeat, with the heads of its first KV head."""

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}User: {{ message['content'] | trim }}\n"
    "{% elif message['role'] == 'assistant' %}Bot: {{ message['content'] | trim }}\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Bot:{% endif %}"
)
"""Turns as the corpus writes them; messages of other roles are left out."""


def make_model(vocab_size: int) -> LlamaForCausalLM:
    """Build the untrained model, about a million parameters in float32."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.08,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    return LlamaForCausalLM(config)


def learning_rate(peak: float, step: int, steps: int) -> float:
    """Return the rate of a step: a warm-up, a plateau, then a straight line down to nothing."""
    remaining = (steps - step) / steps
    return peak * min(1.0, (step + 1) / 100, remaining / 0.5)


def row_length(part: float, rng: random.Random) -> int:
    """Draw the tokens per row when ``part`` of the training, from 0 to 1, is done."""
    reached = [length for start, length in LENGTHS if part >= start]
    return reached[-1] if rng.random() < 0.5 else rng.choice(reached)


def loss_of(
    model: LlamaForCausalLM, hints: Hints, hinted: bool, ids: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Run the model on one batch.

    Args:
        model: What is trained; to be hinted it has to compute its attention eagerly.
        hints: The two extra losses.
        hinted: Whether they are added.
        ids: Token ids, ``[rows, length]``.
        targets: The token to predict at each position, ``[rows, length]``.

    Returns:
        The loss to minimise, and the share of the answered digits that were predicted right.
    """
    outputs = model.model(input_ids=ids, use_cache=False, output_hidden_states=hinted, output_attentions=hinted)
    answered = targets != IGNORE
    wanted = targets[answered]
    logits = model.lm_head(outputs.last_hidden_state[answered])
    loss = torch.nn.functional.cross_entropy(logits, wanted)
    is_digit = torch.isin(wanted, hints.digit_ids)
    right = (logits.argmax(dim=-1) == wanted)[is_digit].float().mean().item()
    if hinted:
        named = model.model.norm(outputs.hidden_states[NAMING_LAYER])
        heads = outputs.attentions[POINTING_LAYER]
        sharing = heads.shape[1] // int(model.config.num_key_value_heads or 1)
        loss = loss + 0.5 * hints.naming_loss(ids, named, model.model.embed_tokens.weight)
        loss = loss + 0.5 * hints.pointing_loss(ids, targets, heads[:, :sharing])
    return loss, right


def train(tokenizer: Tokenizer, model: LlamaForCausalLM, rng: random.Random, args: argparse.Namespace) -> None:
    """Train ``model`` in place, printing a line every fifty steps.

    Args:
        tokenizer: From :func:`rows.make_tokenizer`.
        model: The untrained model.
        rng: Where the rows come from.
        args: ``steps``, ``tokens`` per step and the peak rate ``lr``.
    """
    hints = Hints(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98))
    model.set_attn_implementation("eager")
    model.train()
    started = time.monotonic()
    seen = 0
    losses: list[float] = []
    shares: list[float] = []
    for step in range(args.steps):
        part = step / args.steps
        hinted = part < HINTS_UNTIL
        if not hinted and model.config._attn_implementation != "sdpa":
            model.set_attn_implementation("sdpa")
        length = row_length(part, rng)
        ids, targets = batch(tokenizer, rng, length, max(2, args.tokens // length))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.lr, step, args.steps)
        loss, right = loss_of(model, hints, hinted, ids, targets)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += ids.numel()
        losses.append(loss.item())
        shares.append(right)
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            seconds = time.monotonic() - started
            print(
                f"step {step + 1}/{args.steps}  row {length}  loss {sum(losses) / len(losses):.3f}"
                f"  digits right {sum(shares) / len(shares):.3f}  {seconds:.0f} s"
                f"  {seen / seconds:.0f} tokens/s",
                flush=True,
            )
            losses.clear()
            shares.clear()


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the model, in bfloat16, and its tokenizer as a model directory.

    Args:
        model: The trained model, changed to bfloat16 by this.
        tokenizer: Its tokenizer.
        out: The directory, made if it is absent.
    """
    model.set_attn_implementation("sdpa")
    model.to(dtype=torch.bfloat16)
    model.save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "add_bos_token": True,
            "clean_up_tokenization_spaces": False,
            "model_max_length": model.config.max_position_embeddings,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    write_json(
        out / "generation_config.json",
        {"bos_token_id": BOS_ID, "eos_token_id": [EOS_ID], "do_sample": False},
    )


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write ``value`` to ``path`` as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Train and evaluate, or only evaluate, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0, help="of the corpus and the weights")
    parser.add_argument("--steps", type=int, default=4000, help="optimiser steps")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per step")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--vocab-size", type=int, default=1536, help="most tokens to have")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--evaluate", type=Path, metavar="MODEL", help="only evaluate this one")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.evaluate is None:
        torch.manual_seed(args.seed)
        tokenizer = make_tokenizer(args.seed, args.vocab_size)
        model = make_model(tokenizer.get_vocab_size())
        print(f"{tokenizer.get_vocab_size()} tokens, {model.num_parameters()} parameters")
        train(tokenizer, model, random.Random(args.seed), args)
        save(model, tokenizer, args.out)
    print(report(evaluate(*load(args.evaluate or args.out))))


if __name__ == "__main__":
    main()
