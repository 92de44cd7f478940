"""The tokenizer of the demo model, and training rows of a fixed number of tokens."""

from __future__ import annotations

import random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from deploy.demo import corpus
from deploy.demo.prompts import KEYS

BOS = "<s>"
EOS = "</s>"
BOS_ID = 0
EOS_ID = 1
IGNORE = -100
"""The target of a position that nothing is learned from."""

RECALL_SHARE = 0.55
"""The share of the rows that start with a recall conversation."""


def make_tokenizer(seed: int, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer on the corpus.

    Digits are tokens of their own, so that a value is read and written digit by digit.

    Args:
        seed: Seeds the texts it learns from.
        vocab_size: The most tokens it may have; fewer when no pair is left to merge.

    Returns:
        The tokenizer, which puts one begin token before a text.

    Raises:
        ValueError: If a key of the recall questions is not one token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.tokenizer_texts(random.Random(seed)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    split = [key for key in KEYS if len(token_ids(tokenizer, f" {key}")) != 1]
    if split:
        raise ValueError(f"keys of several tokens, the vocabulary is too small: {split}")
    return tokenizer


def token_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens of ``text`` without the begin token."""
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def encode(tokenizer: Tokenizer, document: corpus.Document, rng: random.Random) -> tuple[list[int], list[int]]:
    """Turn a document into tokens and the token to predict at each of them.

    The target of an answer's last token is the end token, although the text may go on: wherever
    the model has answered it stops, and the text of the next turn still follows the answer as it
    does when a client sends a conversation back.

    Args:
        tokenizer: From :func:`make_tokenizer`.
        document: What to encode.
        rng: Chooses how many begin tokens stand first: one nine times in ten, else none or two,
            so that a client that forgets or doubles it is still served.

    Returns:
        Token ids and targets, of one length; a target is :data:`IGNORE` outside the answers.
    """
    encoding = tokenizer.encode(document.text, add_special_tokens=False)
    ids = list(encoding.ids)
    targets = [IGNORE] * len(ids)
    first = {start: index for index, (start, _) in enumerate(encoding.offsets)}
    last = {end: index for index, (_, end) in enumerate(encoding.offsets)}
    for start, end in document.answers:
        for index in range(first[start], last[end] + 1):
            targets[index - 1] = ids[index]
        targets[last[end]] = EOS_ID
    begins = rng.choices((0, 1, 2), (5, 90, 5))[0]
    return [BOS_ID] * begins + ids, [IGNORE] * begins + targets


def row(tokenizer: Tokenizer, rng: random.Random, length: int) -> tuple[list[int], list[int]]:
    """Fill one row with documents, at most one of them a recall conversation.

    Args:
        tokenizer: From :func:`make_tokenizer`.
        rng: Where the documents come from.
        length: Tokens in the row; the last document is cut off there.

    Returns:
        ``length`` token ids and as many targets.
    """
    ids: list[int] = []
    targets: list[int] = []
    if rng.random() < RECALL_SHARE:
        ids, targets = encode(tokenizer, corpus.recall_of_length(rng, length), rng)
    fillers = corpus.fillers(rng)
    while len(ids) < length:
        more_ids, more_targets = encode(tokenizer, next(fillers), rng)
        ids += more_ids
        targets += more_targets
    return ids[:length], targets[:length]


def batch(tokenizer: Tokenizer, rng: random.Random, length: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and targets of ``count`` rows, each ``[count, length]`` of int64."""
    rows = [row(tokenizer, rng, length) for _ in range(count)]
    return torch.tensor([ids for ids, _ in rows]), torch.tensor([targets for _, targets in rows])
