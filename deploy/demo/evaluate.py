"""What the demo model scores: exact recall, arithmetic, stories and small talk."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from deploy.demo import corpus
from deploy.demo.prompts import STORY, follow_up, recall_prompt, user_turn
from deploy.demo.rows import EOS_ID, token_ids

PAIRS = (8, 16, 32, 64, 96, 128, 160, 200)
"""The numbers of pairs for which recall is scored."""


def load(directory: Path) -> tuple[LlamaForCausalLM, Tokenizer]:
    """Load a model directory, the weights as float32."""
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval(), Tokenizer.from_file(str(directory / "tokenizer.json"))


@torch.inference_mode()
def is_right(model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str, answer: str) -> bool:
    """Tell whether the greedy continuation of ``prompt`` is ``answer`` and then the end token.

    One pass over prompt and answer decides it: the continuation is the answer exactly when each of
    its tokens is the likeliest one after those before it.
    """
    given = list(tokenizer.encode(prompt).ids)
    wanted = [*token_ids(tokenizer, answer), EOS_ID]
    logits = model(input_ids=torch.tensor([given + wanted])).logits[0]
    return bool(logits[len(given) - 1 : -1].argmax(dim=-1).tolist() == wanted)


@torch.inference_mode()
def complete(model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str, limit: int = 256) -> tuple[str, bool]:
    """Continue ``prompt`` greedily.

    Args:
        model: From :func:`load`.
        tokenizer: Its tokenizer.
        prompt: The text to continue.
        limit: The most tokens to generate.

    Returns:
        The generated text, and whether the model ended it with the end token.
    """
    given = list(tokenizer.encode(prompt).ids)
    output = model.generate(torch.tensor([given]), max_new_tokens=limit, do_sample=False)
    made = output[0, len(given) :].tolist()
    ended = bool(made) and made[-1] == EOS_ID
    return tokenizer.decode(made), ended


def evaluate(model: LlamaForCausalLM, tokenizer: Tokenizer, cases: int = 200) -> dict[str, float]:
    """Score a model.

    Args:
        model: From :func:`load`.
        tokenizer: Its tokenizer.
        cases: How many prompts each score but the last two is taken over.

    Returns:
        The share of exactly right answers, by what was asked.
    """
    scores: dict[str, float] = {}
    for pairs in PAIRS:
        prompts = [recall_prompt(pairs, seed) for seed in range(cases)]
        scores[f"recall of one of {pairs} pairs"] = share(model, tokenizer, prompts)
    firsts = [recall_prompt(64, seed) for seed in range(cases)]
    seconds = [follow_up(prompt, answer, seed) for seed, (prompt, answer) in enumerate(firsts)]
    scores["second turn over 64 pairs"] = share(model, tokenizer, seconds)
    rng = random.Random("arithmetic")
    problems = [corpus.problem(rng, limit=100) for _ in range(5 * cases)]
    turns = [(user_turn(f"what is {problem}?"), result) for problem, result in problems]
    scores["arithmetic below 100, as a chat turn"] = share(model, tokenizer, turns)
    scores["arithmetic below 100, as 12+7="] = share(
        model, tokenizer, [(f"{problem}=", result) for problem, result in problems], ""
    )
    talk = [(user_turn(said), answer) for said, answer in corpus.SMALL_TALK]
    scores["small talk"] = share(model, tokenizer, talk)
    scores["story ends by itself"] = float(complete(model, tokenizer, STORY)[1])
    return scores


def share(model: LlamaForCausalLM, tokenizer: Tokenizer, prompts: list[tuple[str, str]], gap: str = " ") -> float:
    """Return the share of prompts answered right, ``gap`` standing before each answer."""
    right = [is_right(model, tokenizer, prompt, gap + answer) for prompt, answer in prompts]
    return sum(right) / len(right)


def report(scores: dict[str, float]) -> str:
    """Write scores as the rows of a Markdown table."""
    lines = ["| what | right |", "|---|---|"]
    return "\n".join([*lines, *(f"| {what} | {100 * score:.1f} % |" for what, score in scores.items())])
