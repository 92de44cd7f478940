"""Loads a decoder-only checkpoint directory and proves that the engine can serve it.

Called once by each worker at start, before the KV pool is sized; blocking.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils.logging import disable_progress_bar

from baton.config import ModelConfig
from engine.attention.interface import IMPLEMENTATION, AttentionDispatch, register
from engine.dry_run import DryRun, LayerAttention, dry_run
from engine.fused.kit import make_kit
from engine.fused.replace import fuse
from engine.kv.layout import KVLayout, group_layers
from engine.model_support import check_supported, declared_windows
from engine.parallel.group import RankGroup
from engine.parallel.modules import connect
from engine.parallel.plan import plan_shards, shard_config
from engine.parallel.weights import read_shard

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to serve.

    Attributes:
        module: the causal language model, in evaluation mode.
        layers: what each decoder layer asks of attention.
        vocab_size: width of the logits.
        max_model_len: most tokens of one sequence, prompt and output together.
        group: the ranks that hold the rest of it; None where this is all.
        prunes_rows, attends: what its layers do since they were replaced; see `engine.fused.replace.Fusion`.
    """

    module: PreTrainedModel
    layers: tuple[LayerAttention, ...]
    vocab_size: int
    max_model_len: int
    dtype: torch.dtype
    device: torch.device
    group: RankGroup | None = None
    prunes_rows: bool = False
    attends: bool = False

    @property
    def config(self) -> PreTrainedConfig:
        return self.module.config

    @property
    def generation_config(self) -> GenerationConfig:
        """Default sampling and EOS ids of the checkpoint."""
        return self.module.generation_config

    def layout(self, block_size: int) -> KVLayout:
        """The layout of a KV pool for this model."""
        return KVLayout(
            groups=group_layers([layer.window for layer in self.layers]),
            num_kv_heads=self.layers[0].num_kv_heads,
            head_dim=self.layers[0].head_dim,
            block_size=block_size,
            dtype=self.dtype,
        )

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, logit_rows: torch.Tensor, dispatch: AttentionDispatch
    ) -> torch.Tensor:
        """Logits [num_rows, vocab] of the tokens `logit_rows`, in the model's dtype; ids and positions: int64 [T]."""
        return _forward(self.module, token_ids, positions, 0 if self.prunes_rows else logit_rows, dispatch)

    def fuse(self, backend: str, *, batch_invariant: bool = False) -> LoadedModel:
        """The same model with its modules replaced, in place, by faster ones; see `engine.fused`.

        Args:
            backend: the attention backend that will serve it.
            batch_invariant: whether a token's output must not depend on the batch, to the bit.

        Raises:
            ValueError: it would, whatever is replaced.
        """
        kit = make_kit(backend, self.dtype, batch_invariant=batch_invariant)
        if kit is None:
            return self
        return dataclasses.replace(self, **fuse(self.module, self.layers, kit, self.group)._asdict())


def load_model(config: ModelConfig, group: RankGroup | None = None) -> LoadedModel:
    """Load and check a checkpoint.

    Args:
        group: the ranks that share the model, all of which load it now; each reads and holds its shard alone.

    Raises:
        ValueError: the directory, the model or the wanted device or dtype does not do; the message says why.
    """
    path = pathlib.Path(config.path)
    checkpoint = _read_config(path)
    check_supported(checkpoint)
    device = resolve_device(config.device) if group is None else group.device
    dtype = _resolve_dtype(config.dtype, checkpoint.dtype, device)
    max_model_len = _resolve_max_len(config.max_model_len, getattr(checkpoint, "max_position_embeddings", None))
    if group is None:
        module = _load_module(path, checkpoint, dtype, device)
    else:
        module = _load_shard(path, checkpoint, dtype, group)
    try:
        found = _inspect(module, device)
    except ValueError as error:
        raise ValueError(f"{config.path}: {checkpoint.model_type} cannot be served: {error}") from error
    return LoadedModel(module, found.layers, found.vocab_size, max_model_len, dtype, device, group)


def _forward(
    module: PreTrainedModel,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    logit_rows: torch.Tensor | Literal[0],
    dispatch: AttentionDispatch,
) -> torch.Tensor:
    """Logits of the rows, or of all that the last layer answers for if `logit_rows` is 0."""
    output = module(
        input_ids=token_ids[None],
        position_ids=positions[None],
        logits_to_keep=logit_rows,
        use_cache=False,
        attention_dispatch=dispatch,
    )
    return cast(torch.Tensor, output.logits)[0]


def _inspect(module: PreTrainedModel, device: torch.device) -> DryRun:
    def forward(
        token_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, dispatch: AttentionDispatch
    ) -> torch.Tensor:
        return _forward(module, token_ids, positions, rows, dispatch)

    config = module.config
    return dry_run(forward, device, num_layers=config.num_hidden_layers, windows=declared_windows(config))


def _read_config(path: pathlib.Path) -> PreTrainedConfig:
    if not path.is_dir():
        raise ValueError(f"{path}: no such directory")
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"{path}: not a checkpoint directory: it has no config.json")
    if not any(path.glob("*.safetensors")):
        raise ValueError(f"{path}: it has no *.safetensors weights")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{file}: unreadable: {error}") from error
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise ValueError(f"{file}: it names no model_type")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"{file}: transformers cannot read it: {error}") from error


def _load_module(
    path: pathlib.Path, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    return _from_pretrained(path, path, config, dtype, use_safetensors=True).to(device)


def _load_shard(path: pathlib.Path, config: PreTrainedConfig, dtype: torch.dtype, group: RankGroup) -> PreTrainedModel:
    plan = plan_shards(config, group.size)
    vocab_size = config.vocab_size
    try:
        weights = read_shard(path, plan, rank=group.rank, size=group.size, vocab_size=vocab_size, dtype=dtype)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: its weights cannot be read: {error}") from error
    module = _from_pretrained(path, None, shard_config(config, group.size), dtype, state_dict=weights).to(group.device)
    # What transformers reads beside the weights where it reads these itself.
    with contextlib.suppress(OSError):
        module.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    connect(module, plan, group, vocab_size)
    return module


def _from_pretrained(
    path: pathlib.Path, source: pathlib.Path | None, config: PreTrainedConfig, dtype: torch.dtype, **weights: Any
) -> PreTrainedModel:
    """The model, for inference, in host memory.

    Args:
        path: the checkpoint, for errors.
        source: where transformers reads the weights; None where they are given.
    """
    register()
    disable_progress_bar()
    try:
        module, report = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            source,
            config=config,
            dtype=dtype,
            attn_implementation=IMPLEMENTATION,
            local_files_only=True,
            output_loading_info=True,
            **weights,
        )
    except KeyError as error:
        raise ValueError(
            f"{path}: {config.model_type} does not take its attention from transformers' AttentionInterface ({error})"
        ) from error
    except Exception as error:
        raise ValueError(f"{path}: transformers cannot load it: {error}") from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{path}: the weights lack {len(missing)} tensors, such as {missing[0]}")
    return cast(PreTrainedModel, module.eval().requires_grad_(False))


def resolve_device(name: str) -> torch.device:
    """The device that a config names; "auto" is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("model.device: 'cuda' is wanted, but torch finds no GPU")
    return torch.device(name)


def _resolve_dtype(name: str, stored: Any, device: torch.device) -> torch.dtype:
    """The wanted dtype; "auto" is bfloat16 for half-precision weights where the device computes in it, else float32.

    On a CPU without bfloat16 instructions torch emulates them: linear layers were 7 to 9 times slower than in float32.
    """
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cuda":
        is_half = stored in (torch.bfloat16, torch.float16)
    else:
        is_half = stored == torch.bfloat16 and _cpu_has_bfloat16()
    return torch.bfloat16 if is_half else torch.float32


def _cpu_has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _resolve_max_len(wanted: int | None, trained: int | None) -> int:
    limit = wanted or trained
    if limit is None:
        raise ValueError("model.max_model_len: the checkpoint declares no max_position_embeddings; set a limit")
    if trained is not None and limit > trained:
        raise ValueError(f"model.max_model_len: {limit} exceeds the checkpoint's max_position_embeddings, {trained}")
    return limit
