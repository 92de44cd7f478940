"""A worker's engine: the model, its KV pool and what runs one on the other, made together at start."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import pathlib

import psutil
import torch

from baton.config import CacheConfig, ModelConfig
from baton.hashing import extend_chain
from baton.requests import RequestSpec
from engine.attention import AttentionBackend, make_backend, resolve_backend
from engine.cores import Cores
from engine.cpu_kernels.compiling import compiling_once
from engine.gpu_memory import measured_pool_bytes
from engine.grammar import Grammars
from engine.kv.cache import KVCache
from engine.kv.layout import KVLayout
from engine.model_loader import LoadedModel, load_model
from engine.model_runner import ModelRunner
from engine.parallel.group import RankGroup
from engine.parallel.leading import Followers, LeadingRunner
from engine.revision import checkpoint_revision
from engine.sampling import prepare

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
    model_config: ModelConfig,
    cache_config: CacheConfig,
    *,
    chunk_tokens: int,
    decode_sequences: int = 0,
    poison: bool = False,
    group: RankGroup | None = None,
    followers: Followers | None = None,
) -> Engine:
    """Load the model, size and allocate the pool.

    Args:
        chunk_tokens: most tokens of one sequence that the worker computes in a step.
        decode_sequences: most sequences that it takes one token further beside these.
        poison: fill free blocks with NaN, so that tests see reads of what was not written.
        group: the ranks that share the model, all of which load their engines now; None for one alone.
        followers: the other ranks' engines, on rank 0; this one has them do what it does.

    Raises:
        ValueError: the checkpoint cannot be served, or the pool cannot hold one sequence; the message says why.
    """
    if model_config.num_threads:
        torch.set_num_threads(model_config.num_threads)
    model = load_model(model_config, group)
    layout = model.layout(cache_config.block_size)
    num_ranks = 1 if group is None else group.size
    on_cpu = model.device.type == "cpu"
    graph_rows = decode_sequences if model_config.cuda_graphs and not on_cpu else 0
    num_bytes = (cache_config.kv_cache_bytes or 0) // num_ranks
    if on_cpu and not num_bytes:
        num_bytes = _default_bytes(layout, model.max_model_len)
    # On a CPU before anything is compiled, since ranks wait for each other in both.
    num_blocks = _num_blocks(layout, num_bytes, group) if num_bytes else 0
    with compiling_once() if on_cpu else contextlib.nullcontext():
        model, backend = _equip(model, model_config, num_ranks)
        if not num_blocks:
            num_bytes = measured_pool_bytes(
                model,
                layout,
                backend,
                utilization=cache_config.gpu_memory_utilization,
                chunk_tokens=chunk_tokens,
                decode_sequences=decode_sequences,
                graphs=graph_rows > 0,
            )
            num_blocks = _num_blocks(layout, num_bytes, group)
        return _assemble(
            model, backend, model_config, cache_config, num_blocks, chunk_tokens, graph_rows, poison, followers
        )


def _num_blocks(layout: KVLayout, num_bytes: int, group: RankGroup | None) -> int:
    """Blocks of the pool, the same on all ranks."""
    num_blocks = KVCache.num_blocks_for(layout, num_bytes)
    return num_blocks if group is None else group.smallest(num_blocks)


def _equip(model: LoadedModel, config: ModelConfig, num_ranks: int) -> tuple[LoadedModel, AttentionBackend]:
    """The model with what its device has of faster modules, and the attention that goes with them.

    Raises:
        ValueError: there is no such attention, or a token's output would depend on the batch and must not.
    """
    name = resolve_backend(config.attention, model.device, head_dim=model.layers[0].head_dim)
    if not config.batch_invariant:
        return model.fuse(name), make_backend(name, model.device)
    if num_ranks > 1:
        raise ValueError(
            "model.batch_invariant: sums over several ranks depend on the batch; set tensor_parallel_size 1"
        )
    model = model.fuse(name, batch_invariant=True)
    if name == "triton":
        return model, make_backend(name, model.device, batch_invariant=True)
    if not model.attends:
        raise ValueError(
            "model.batch_invariant: on a GPU it takes attention 'triton', on a CPU attention 'cpu' and a model of the "
            f"Llama shape in float32, not {name!r} and {model.config.model_type} in {_name(model.dtype)}"
        )
    return model, make_backend(name, model.device)


def _assemble(
    model: LoadedModel,
    backend: AttentionBackend,
    model_config: ModelConfig,
    cache_config: CacheConfig,
    num_blocks: int,
    chunk_tokens: int,
    graph_rows: int,
    poison: bool,
    followers: Followers | None,
) -> Engine:
    """The engine of a loaded model; for `graph_rows` see `ModelRunner`."""
    layout = model.layout(cache_config.block_size)
    cache = KVCache(
        layout,
        num_blocks,
        enable_caching=cache_config.enable_prefix_cache,
        device=model.device,
        poison=poison,
        mirror=followers,
    )
    fits = cache.max_sequence_tokens(model.max_model_len, chunk_tokens=chunk_tokens)
    measured = cache_config.kv_cache_bytes is None and model.device.type != "cpu"
    setting = "cache.gpu_memory_utilization" if measured else "cache.kv_cache_bytes"
    max_model_len = _limit_length(model_config, model.max_model_len, fits, num_blocks * layout.block_bytes, setting)
    prepare(model.vocab_size, model.device)
    # A model on a GPU has no use for more cores.
    cores = Cores(model_config.num_threads, model_config.max_threads if model.device.type == "cpu" else 0)
    make_runner = ModelRunner if followers is None else functools.partial(LeadingRunner, followers)
    runner = make_runner(model, layout, cache.kv, backend, cores, max_graph_rows=graph_rows)
    logger.info(
        "loaded %s: %d layers, %s, %d KV blocks of %d tokens (%.1f MiB), at most %d tokens a sequence",
        model_config.path,
        layout.num_layers,
        _name(model.dtype),
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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _eos_token_ids(model: LoadedModel) -> list[int]:
    """The generation config's, else the model config's; empty where neither names any."""
    for config in (model.generation_config, model.config):
        if (ids := getattr(config, "eos_token_id", None)) is not None:
            return ids if isinstance(ids, list) else [ids]
    return []


def _default_bytes(layout: KVLayout, max_model_len: int) -> int:
    wanted = _MAX_DEFAULT_SEQUENCES * (layout.num_blocks(max_model_len) + 1) * len(layout.groups) * layout.block_bytes
    return min(wanted, int(psutil.virtual_memory().available * _FREE_MEMORY_SHARE))


def _limit_length(config: ModelConfig, max_model_len: int, fits: int, num_bytes: int, setting: str) -> int:
    """The length that the pool can hold: an explicit length must fit, the model's own is lowered to what does.

    Args:
        setting: what gave the pool its size.
    """
    if fits >= max_model_len:
        return max_model_len
    if config.max_model_len is not None or fits == 0:
        raise ValueError(
            f"{setting}: {num_bytes} bytes hold {fits} tokens, not one sequence of max_model_len "
            f"{max_model_len}; raise it or lower model.max_model_len"
        )
    logger.warning(
        "the KV pool of %d bytes limits sequences to %d of the model's %d tokens", num_bytes, fits, max_model_len
    )
    return fits
