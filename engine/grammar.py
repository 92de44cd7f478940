"""Guided decoding: which tokens a choice's grammar allows next, by llguidance.

A worker's service has a grammar compiled in `Grammars` before its request reaches the engine thread; there each choice
gets a `Guide` of its own, fed with every token of the choice, and `mask_logits` excludes what no guide allows. A guide
that fails (a grammar that grows beyond llguidance's limits) allows everything and says so in `error`, so that only its
own request ends.
"""

from __future__ import annotations

import collections
import logging
import pathlib
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future

import numpy as np
import numpy.typing as npt
import torch
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask_par

from baton.errors import InvalidRequestError
from baton.grammar import FIELD, GrammarThreads, invalid_grammar, llguidance_grammar, parser_limits, shortened
from baton.requests import Grammar, SamplingParams
from engine.cpu_kernels import choosing
from engine.staging import to_device

logger = logging.getLogger(__name__)

# Compiled grammars that are kept: most clients send the same few again and again.
_MAX_COMPILED = 64
_NUM_THREADS = 2

Bits = npt.NDArray[np.int32]


class Guide:
    """Follows one choice through its grammar. Engine thread only.

    Attributes:
        error: what went wrong, for the client; None while all is well.
        executor: computes the masks of many guides at a time.
    """

    def __init__(self, matcher: LLMatcher, executor: LLExecutor, params: SamplingParams, eos: Sequence[int]) -> None:
        self._matcher = matcher
        self.executor = executor
        self.error: InvalidRequestError | None = None
        endings = params.ending_token_ids
        self._ignored = _bits_without(set(eos) - endings)
        self._held_back = _bits_without(endings | set(eos))
        self._min_tokens = params.min_tokens
        self._num_tokens = 0

    @property
    def matcher(self) -> LLMatcher:
        return self._matcher

    @property
    def is_over(self) -> bool:
        """Whether nothing can follow: the text is whole, or the guide has failed."""
        return self._matcher.is_stopped()

    def append(self, token_id: int) -> None:
        """Takes note of the next token of the choice."""
        self._num_tokens += 1
        if self.error is None and not self._matcher.consume_token(token_id):
            self._fail(self._matcher.get_error())

    def restrict(self, allowed: Bits) -> None:
        """Takes the endings that the request ignores, or holds back with `min_tokens`, out of a row of bits in place.

        The grammar wins: what it allows stays where nothing else is left.
        """
        if self._matcher.is_error():
            self._fail(self._matcher.get_error())
        elif not allowed.any():
            self._fail("it allows no token here")
        if self.error is not None:
            allowed.fill(-1)
            return
        words, bits = self._held_back if self._num_tokens < self._min_tokens else self._ignored
        if len(words):
            whole = allowed.copy()
            known = words < len(allowed)
            np.bitwise_and.at(allowed.view(np.uint32), words[known], bits[known])
            if not allowed.any():
                allowed[:] = whole

    def _fail(self, problem: str) -> None:
        if self.error is None:
            self.error = InvalidRequestError(FIELD, f"cannot be followed further: {shortened(problem)}")


def _bits_without(token_ids: Iterable[int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
    """Words of a row of bits, and what to AND each with so that these tokens' bits are cleared."""
    ids = np.array(sorted(token_ids), np.int64)
    return ids // 32, ~np.left_shift(np.uint32(1), (ids % 32).astype(np.uint32))


class CompiledGrammar:
    """A grammar for one engine's tokenizer; any number of choices start from it. Engine thread only."""

    def __init__(self, matcher: LLMatcher, executor: LLExecutor, eos: Sequence[int]) -> None:
        self._matcher = matcher
        self._executor = executor
        self._eos = eos

    def guide(self, params: SamplingParams) -> Guide:
        """For a choice that has no token yet. Costs microseconds."""
        return Guide(self._matcher.deep_copy(), self._executor, params, self._eos)


class Grammars:
    """Compiles grammars for one engine, in threads of its own, and keeps those last used. Any thread may call.

    Args:
        folder: the checkpoint; its tokenizer.json is read here, since building its trie holds Python's lock (0.8 s at
            128,000 tokens) and must not stall a running engine.
        vocab_size: of the model's logits.
        eos_token_ids: allowed wherever a grammar accepts the text; empty leaves them to the tokenizer.
        num_threads: threads that compute one step's masks.
    """

    def __init__(
        self, folder: pathlib.Path, *, vocab_size: int, eos_token_ids: Sequence[int], num_threads: int
    ) -> None:
        self._tokenizer: LLTokenizer | None = None
        try:
            self._tokenizer = _read_tokenizer(folder, vocab_size, eos_token_ids)
        except (OSError, ValueError) as error:
            logger.warning("requests with a grammar will be refused: %s: %s", folder / "tokenizer.json", error)
        self._executor = LLExecutor(num_threads)
        self._compiled: collections.OrderedDict[Grammar, Future[CompiledGrammar]] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._threads = GrammarThreads(_NUM_THREADS)

    def compile(self, grammar: Grammar) -> Future[CompiledGrammar]:
        """The grammar, compiled once however many ask; InvalidRequestError where it is not valid. Do not cancel it."""
        with self._lock:
            if (known := self._compiled.get(grammar)) is not None:
                self._compiled.move_to_end(grammar)
                return known
            future = self._compiled[grammar] = self._threads.submit(self._compile, grammar)
            if len(self._compiled) > _MAX_COMPILED:
                self._compiled.popitem(last=False)
            return future

    def close(self) -> None:
        """End the threads, after what they compile now."""
        self._threads.close()

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        if self._tokenizer is None:
            raise InvalidRequestError(FIELD, "this model's tokenizer cannot be guided")
        matcher = LLMatcher(self._tokenizer, llguidance_grammar(grammar), log_level=0, limits=parser_limits())
        if matcher.is_error():
            raise invalid_grammar(grammar, matcher.get_error())
        return CompiledGrammar(matcher, self._executor, self._tokenizer.eos_tokens)


def _read_tokenizer(folder: pathlib.Path, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    return LLTokenizer(text, n_vocab=vocab_size, eos_token=list(eos_token_ids) or None)


def mask_logits(logits: torch.Tensor, guided: Sequence[tuple[int, Guide]]) -> None:
    """Sets the logits of what grammars do not allow to -inf, in place.

    Args:
        logits: float32 [R, vocabulary].
        guided: rows and their guides, all of one engine.
    """
    rows = [row for row, _ in guided]
    vocabulary = logits.shape[1]
    bits = np.zeros((len(guided), -(-vocabulary // 32)), np.int32)
    matchers = [(guide.matcher, index) for index, (_, guide) in enumerate(guided)]
    fill_next_token_bitmask_par(guided[0][1].executor, matchers, bits)
    for (_, guide), allowed in zip(guided, bits, strict=True):
        guide.restrict(allowed)
    if logits.device.type == "cpu":
        choosing.exclude(logits.numpy(), np.array(rows, np.int64), bits)
    else:
        index, octets = to_device([np.array(rows), bits.view(np.uint8)], logits.device)
        logits[index] += allowed_bias(octets)[:, :vocabulary]


def allowed_bias(octets: torch.Tensor) -> torch.Tensor:
    """What rows of bits, uint8 [R, n], add to logits: float32 [R, 8 * n] of 0 and -inf, on their device."""
    # 8 tokens of each byte at a time: a table of what to add takes a third of the time that masks of single bits take.
    return torch.nn.functional.embedding(octets.int(), _bias_of_octets(octets.device)).flatten(1)


def _bias_of_octets(device: torch.device) -> torch.Tensor:
    """What 8 bits, the lowest first, add to the logits of 8 tokens: float32 [256, 8] of 0 and -inf."""
    octets = torch.arange(256, device=device).unsqueeze(-1)
    allowed = (octets >> torch.arange(8, device=device)) & 1
    return torch.where(allowed == 1, 0.0, -torch.inf)
