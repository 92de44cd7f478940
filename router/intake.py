"""Takes requests in: checks them, tokenises them off the event loop, hashes their blocks; once for all attempts."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from baton.config import RouterConfig
from baton.errors import UnavailableError
from baton.hashing import extend_chain, model_identity, root_hash
from baton.v1 import inference_pb2
from router.grammar import GrammarCheck
from router.job import Prompt
from router.membership import Membership
from router.model_card import ModelCard
from router.tokenization import Tokenizer
from router.validation import Limits, check_envelope, check_prompt, check_prompt_length, resolve_sampling

# Hashing or decoding a prompt up to this long takes less than a thread hop is worth.
_MAX_INLINE_TOKENS = 4096


class _Blocks(NamedTuple):
    """What a prompt's hashes depend on beside the prompt: the same for all workers, and for as long as the router runs.

    Attributes:
        identity: of `baton.hashing.model_identity`.
        size: tokens of a block.
    """

    identity: str
    size: int


class Intake:
    """The door of the pipeline."""

    def __init__(
        self,
        card: ModelCard,
        tokenizer: Tokenizer,
        membership: Membership,
        config: RouterConfig,
        grammars: GrammarCheck,
    ) -> None:
        self._card = card
        self._tokenizer = tokenizer
        self._membership = membership
        self._config = config
        self._grammars = grammars
        self._known_blocks: _Blocks | None = None

    async def accept(self, request: inference_pb2.GenerateRequest) -> Prompt:
        """The request as the pipeline needs it; raises the `baton.errors` that tell a client what is wrong.

        Waits for the first decode worker to be known, since limits and hashes depend on it.
        """
        check_envelope(request, self._card)
        blocks = self._known_blocks or await self._blocks()
        token_ids = await self._token_ids(request)
        limits = self.limits()
        check_prompt(token_ids, limits)
        sampling = resolve_sampling(
            request.sampling, num_prompt_tokens=len(token_ids), card=self._card, limits=limits, config=self._config
        )
        if sampling.grammar is not None:
            await self._grammars.check(sampling.grammar)
        skips_special = not request.sampling.HasField("skip_special_tokens") or request.sampling.skip_special_tokens
        salt_root = root_hash(blocks.identity, request.cache_salt)
        return Prompt(
            token_ids=token_ids,
            sampling=sampling,
            stops=tuple(request.sampling.stop),
            block_hashes=await self._block_hashes(salt_root, token_ids, blocks.size),
            salt_root=salt_root,
            block_size=blocks.size,
            priority=request.priority,
            include_stop=request.sampling.include_stop,
            skip_special_tokens=skips_special,
            echo=await self._echo(request, token_ids, skips_special)
            if request.sampling.echo or sampling.prompt_logprobs is not None
            else None,
        )

    def limits(self) -> Limits:
        """What the model and the roomiest decode worker can hold; needs a decode worker to have been seen."""
        infos = self._membership.decode_infos
        assert infos
        return Limits(
            vocab_size=self._card.vocab_size,
            max_model_len=max(info.max_model_len for info in infos),
            max_sequence_tokens=max(info.max_sequence_tokens for info in infos),
            block_size=infos[0].block_size,
        )

    async def _blocks(self) -> _Blocks:
        try:
            async with asyncio.timeout(self._config.worker_wait_s):
                layout = await self._membership.model_layout()
        except TimeoutError:
            raise UnavailableError("no decode worker has joined yet") from None
        self._known_blocks = _Blocks(model_identity(layout), layout.block_size)
        return self._known_blocks

    async def _token_ids(self, request: inference_pb2.GenerateRequest) -> tuple[int, ...]:
        if request.WhichOneof("prompt") == "token_ids":
            check_prompt_length(len(request.token_ids.ids), self.limits())
            return tuple(request.token_ids.ids)
        return tuple(await self._tokenizer.encode(request.text))

    async def _block_hashes(self, root: bytes, token_ids: tuple[int, ...], block_size: int) -> tuple[bytes, ...]:
        if len(token_ids) <= _MAX_INLINE_TOKENS:
            return tuple(extend_chain(root, token_ids, block_size))
        return tuple(await self._tokenizer.run(extend_chain, root, token_ids, block_size))

    async def _echo(
        self, request: inference_pb2.GenerateRequest, token_ids: tuple[int, ...], skips_special: bool
    ) -> inference_pb2.PromptEcho:
        """The prompt as it was sent, or as its ids read."""
        decode = self._tokenizer.decode
        if request.WhichOneof("prompt") == "text":
            text = request.text
        elif len(token_ids) <= _MAX_INLINE_TOKENS:
            text = decode(token_ids, skip_special_tokens=skips_special)
        else:
            text = await self._tokenizer.run(decode, token_ids, skip_special_tokens=skips_special)
        return inference_pb2.PromptEcho(text=text, token_ids=token_ids)
