"""Two extra losses that teach the model where to look, for the first part of the training.

To answer ``blue?`` a model has to learn two things that only pay off together: that the three
digits after ``blue=`` belong to ``blue``, and that the key just asked for selects them.  Left to
itself a small model stays for a long time at guessing among all the values it has seen.  The first
hint makes the first layer name the key each token belongs to; the second makes a few heads of one
later layer look from each answered digit to the digit it repeats.  Both are dropped once the model
recalls, and the rest of the training sees nothing but next tokens.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer

from deploy.demo.prompts import KEYS
from deploy.demo.rows import token_ids

REACH = 7
"""How many tokens after a key still belong to it: up to the second digit of an answer."""

NONE = -1
"""Marks a position that belongs to no key."""


def shifted(values: torch.Tensor, by: int, fill: int) -> torch.Tensor:
    """Move ``values``, ``[rows, length]``, to the right by ``by`` positions."""
    moved = torch.full_like(values, fill)
    moved[:, by:] = values[:, :-by]
    return moved


class Hints:
    """The tokens that matter to a recall question, and the losses made from them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Look up the tokens of the keys, of the digits and of the sign between them."""
        self.key_ids = torch.tensor([token_ids(tokenizer, f" {key}")[0] for key in KEYS])
        self.digit_ids = torch.tensor([token_ids(tokenizer, str(digit))[0] for digit in range(10)])
        self.equals_id = token_ids(tokenizer, "=")[0]
        self.key_index = torch.full((tokenizer.get_vocab_size(),), NONE)
        self.key_index[self.key_ids] = torch.arange(len(KEYS))

    def owners(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the number of the latest key before each token, or :data:`NONE`.

        Args:
            ids: Token ids, ``[rows, length]``.

        Returns:
            Indices into the keys, ``[rows, length]``.
        """
        keys = self.key_index[ids]
        owner = torch.full_like(ids, NONE)
        for distance in range(1, REACH + 1):
            owner = torch.where(owner == NONE, shifted(keys, distance, NONE), owner)
        return owner

    def naming_loss(self, ids: torch.Tensor, hidden: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """Return how badly a layer's output names the key that each token belongs to.

        Args:
            ids: Token ids, ``[rows, length]``.
            hidden: The normalised output of the layer, ``[rows, length, hidden]``.
            embeddings: The token embeddings, ``[vocabulary, hidden]``.

        Returns:
            A mean cross entropy in nats, a scalar.
        """
        owner = self.owners(ids)
        named = owner != NONE
        logits = hidden[named] @ embeddings[self.key_ids].T
        return torch.nn.functional.cross_entropy(logits, owner[named])

    def pointing_loss(self, ids: torch.Tensor, targets: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """Return how little the heads look at the digit that is to be repeated.

        Args:
            ids: Token ids, ``[rows, length]``.
            targets: The token to predict at each position, ``[rows, length]``.
            attention: Attention probabilities, ``[rows, heads, length, length]``.

        Returns:
            The mean negative logarithm of the probability on the right positions, a scalar.
        """
        owner = self.owners(ids)
        is_digit = torch.isin(ids, self.digit_ids)
        before = is_digit.long()
        written = before + before * shifted(before, 1, 0)
        wanted = torch.where(torch.isin(targets, self.digit_ids) & (owner != NONE), written, NONE)
        given_key = torch.full_like(ids, NONE)
        given_slot = torch.full_like(ids, NONE - 1)
        after_equals = torch.where(ids == self.equals_id, shifted(self.key_index[ids], 1, NONE), NONE)
        for slot in range(3):
            key = shifted(after_equals, slot + 1, NONE)
            is_value = (key != NONE) & is_digit
            given_key = torch.where(is_value, key, given_key)
            given_slot = torch.where(is_value, slot, given_slot)
        source = (owner[:, :, None] == given_key[:, None, :]) & (wanted[:, :, None] == given_slot[:, None, :])
        source = source.tril()
        asked = source.any(dim=-1)
        looked = (attention * source[:, None]).sum(dim=-1)
        return -torch.log(looked.transpose(1, 2)[asked] + 1e-6).mean()
