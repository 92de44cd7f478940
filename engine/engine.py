"""A worker's engine: the model, its KV pool and what runs one on the other, made together at start."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import pathlib

import psutil
import torch

from baton.config import CacheConfig, ModelConfig
from baton.hashing import extend_chain
from baton.requests import RequestSpec
from engine import choosing_cpu
from engine.attention import make_backend, resolve_backend
from engine.cores import Cores
from engine.cpu_kernels.compiling import compiling_once
from engine.grammar import Grammars
from engine.kv.cache import KVCache
from engine.kv.layout import KVLayout
from engine.model_loader import LoadedModel, load_model
from engine.model_runner import ModelRunner
from engine.revision import checkpoint_revision

logger = logging.getLogger(__name__)

# Without kv_cache_bytes: this share of the memory that is free at start, but no more than this many longest sequences.
_FREE_MEMORY_SHARE = 0.125
_MAX_DEFAULT_SEQUENCES = 32


@dataclasses.dataclass(frozen=True, slots=True)
class Engine:
    """Used by one engine thread.

    Attributes:
        revision: identity of the checkpoint's content.
        max_model_len: most tokens of a sequence, prompt and completion, that the model and the pool allow.
        max_sequence_tokens: most tokens that one sequence can hold with the pool to itself.
    """

    model: LoadedModel
    layout: KVLayout
    cache: KVCache
    runner: ModelRunner
    grammars: Grammars
    cores: Cores
    revision: str
    max_model_len: int
    max_sequence_tokens: int

    def prefix_hashes(self, spec: RequestSpec) -> list[bytes]:
        """Hashes of the full blocks of `spec.shared_token_ids`: the prompt's, extended over what was delivered."""
        hashes = list(spec.block_hashes)
        rest = spec.shared_token_ids[len(hashes) * self.layout.block_size :]
        return hashes + extend_chain(hashes[-1] if hashes else spec.salt_root, rest, self.layout.block_size)


def load_engine(
    model_config: ModelConfig, cache_config: CacheConfig, *, chunk_tokens: int, poison: bool = False
) -> Engine:
    """Load the model, size and allocate the pool.

    Args:
        chunk_tokens: most tokens of one sequence that the worker computes in a step.
        poison: fill free blocks with NaN, so that tests see reads of what was not written.

    Raises:
        ValueError: the checkpoint cannot be served, or the pool cannot hold one sequence; the message says why.
    """
    if model_config.num_threads:
        torch.set_num_threads(model_config.num_threads)
    model = load_model(model_config)
    with compiling_once() if model.device.type == "cpu" else contextlib.nullcontext():
        return _assemble(model, model_config, cache_config, chunk_tokens, poison)


def _assemble(
    model: LoadedModel, model_config: ModelConfig, cache_config: CacheConfig, chunk_tokens: int, poison: bool
) -> Engine:
    """The engine of a loaded model."""
    backend_name = resolve_backend(model_config.attention, model.device)
    if backend_name == "cpu":
        model = model.fuse()
    layout = model.layout(cache_config.block_size)
    num_bytes = cache_config.kv_cache_bytes or _default_bytes(layout, model.max_model_len)
    cache = KVCache(
        layout,
        KVCache.num_blocks_for(layout, num_bytes),
        enable_caching=cache_config.enable_prefix_cache,
        device=model.device,
        poison=poison,
    )
    fits = cache.max_sequence_tokens(model.max_model_len, chunk_tokens=chunk_tokens)
    max_model_len = _limit_length(model_config, model.max_model_len, fits, num_bytes)
    if model.device.type == "cpu":
        choosing_cpu.prepare()
    # A model on a GPU has no use for more cores.
    cores = Cores(model_config.num_threads, model_config.max_threads if model.device.type == "cpu" else 0)
    runner = ModelRunner(model, layout, cache.kv, make_backend(backend_name, model.device), cores)
    logger.info(
        "loaded %s: %d layers, %s, %d KV blocks of %d tokens (%.1f MiB), at most %d tokens a sequence",
        model_config.path,
        layout.num_layers,
        str(model.dtype).removeprefix("torch."),
        cache.pool.num_usable,
        layout.block_size,
        cache.pool.num_blocks * layout.block_bytes / 2**20,
        max_model_len,
    )
    folder = pathlib.Path(model_config.path)
    grammars = Grammars(
        folder,
        vocab_size=model.vocab_size,
        eos_token_ids=_eos_token_ids(model),
        num_threads=torch.get_num_threads(),
    )
    return Engine(model, layout, cache, runner, grammars, cores, checkpoint_revision(folder), max_model_len, fits)


def _eos_token_ids(model: LoadedModel) -> list[int]:
    """The generation config's, else the model config's; empty where neither names any."""
    for config in (model.generation_config, model.config):
        if (ids := getattr(config, "eos_token_id", None)) is not None:
            return ids if isinstance(ids, list) else [ids]
    return []


def _default_bytes(layout: KVLayout, max_model_len: int) -> int:
    wanted = _MAX_DEFAULT_SEQUENCES * (layout.num_blocks(max_model_len) + 1) * len(layout.groups) * layout.block_bytes
    return min(wanted, int(psutil.virtual_memory().available * _FREE_MEMORY_SHARE))


def _limit_length(config: ModelConfig, max_model_len: int, fits: int, num_bytes: int) -> int:
    """The length that the pool can hold: an explicit length must fit, the model's own is lowered to what does."""
    if fits >= max_model_len:
        return max_model_len
    if config.max_model_len is not None or fits == 0:
        raise ValueError(
            f"cache.kv_cache_bytes: {num_bytes} bytes hold {fits} tokens, not one sequence of max_model_len "
            f"{max_model_len}; raise it or lower model.max_model_len"
        )
    logger.warning(
        "the KV pool of %d bytes limits sequences to %d of the model's %d tokens", num_bytes, fits, max_model_len
    )
    return fits
