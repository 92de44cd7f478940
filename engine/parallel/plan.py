"""What of a family's weights each rank holds, and where ranks' partial results are added up.

A family's own plan names its linear layers: those that are cut by their outputs ("colwise": the ranks' heads, the
ranks' part of the inner layer), and those that read what these made, cut by their inputs ("rowwise"), whose results are
the ranks' summands. Embeddings and the head are cut by vocabulary whatever the plan says of them.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

# Config fields whose number of heads or columns is divided among the ranks.
_DIVIDED = ("num_key_value_heads", "num_attention_heads", "intermediate_size")
_ATTENTION = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
}
# What transformers cuts for training or by experts, if at all, is cut here by each expert's inner columns; gate and up
# alternate in these, so that a contiguous part has as many of both.
_OWN_STYLES = {"gpt_oss": _ATTENTION}
_OWN_DIMENSIONS = {
    "gpt_oss": {
        "layers.*.self_attn.sinks": 0,
        "layers.*.mlp.experts.gate_up_proj": 2,
        "layers.*.mlp.experts.gate_up_proj_bias": 1,
        "layers.*.mlp.experts.down_proj": 1,
    }
}
_OWN_SUMMANDS = {"gpt_oss": {"layers.*.mlp.experts": ("down_proj_bias",)}}


@dataclasses.dataclass(frozen=True, slots=True)
class ShardPlan:
    """How a checkpoint is cut. Names are those of the causal language model, with * for the layer's number.

    Attributes:
        dimensions: parameters that are cut, and along which dimension.
        first_rank_only: parameters that are added to summands, and so are zero on all ranks but the first.
        summands: modules whose outputs are to be added up over the ranks.
        embedding, head: modules that are cut by vocabulary.
    """

    dimensions: Mapping[str, int]
    first_rank_only: frozenset[str]
    summands: frozenset[str]
    embedding: str
    head: str


def plan_shards(config: PreTrainedConfig, size: int) -> ShardPlan:
    """How a model is cut into `size` shards.

    Raises:
        ValueError: it cannot be; names the field or the family.
    """
    _check_divides(config, size)
    family = config.model_type
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    prefix = model_class.base_model_prefix
    styles = _OWN_STYLES.get(family) or config.base_model_tp_plan
    if not styles:
        raise ValueError(f"tensor_parallel_size: {size}, but transformers has no tensor-parallel plan for {family}")
    dimensions = {f"{prefix}.{name}": dimension for name, dimension in _OWN_DIMENSIONS.get(family, {}).items()}
    first_rank_only = set()
    summands = set()
    for module, biases in _OWN_SUMMANDS.get(family, {}).items():
        summands.add(f"{prefix}.{module}")
        first_rank_only |= {f"{prefix}.{module}.{bias}" for bias in biases}
    for module, style in styles.items():
        name = f"{prefix}.{module}"
        match style:
            case "colwise":
                dimensions |= {f"{name}.weight": 0, f"{name}.bias": 0}
            case "rowwise":
                dimensions[f"{name}.weight"] = 1
                first_rank_only.add(f"{name}.bias")
                summands.add(name)
            case "replicated_with_grad_allreduce" | "embedding_rowwise":
                pass
            case _:
                raise ValueError(f"tensor_parallel_size: {size}, but {family}'s {module} is cut {style}, unsupported")
    embedding, head = f"{prefix}.embed_tokens", "lm_head"
    dimensions |= {f"{embedding}.weight": 0, f"{head}.weight": 0, f"{head}.bias": 0}
    return ShardPlan(dimensions, frozenset(first_rank_only), frozenset(summands), embedding, head)


def shard_config(config: PreTrainedConfig, size: int) -> PreTrainedConfig:
    """The config of one shard: a model made from it has modules of the shard's sizes."""
    shard = copy.deepcopy(config)
    if getattr(shard, "head_dim", None) is None:
        shard.head_dim = config.hidden_size // config.num_attention_heads
    for field in _DIVIDED:
        setattr(shard, field, _value(config, field) // size)
    shard.vocab_size = rows_of_vocabulary(config.vocab_size, size)
    # Matters to nothing that is computed here, but must lie in the vocabulary.
    shard.pad_token_id = None
    return shard


def rows_of_vocabulary(vocab_size: int, size: int) -> int:
    """Rows of the vocabulary on each rank; where they are too many the last ranks' are filled up with zeros."""
    return -(-vocab_size // size)


def generic(name: str) -> str:
    """A parameter's or a module's name with * for the layer's number."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _check_divides(config: PreTrainedConfig, size: int) -> None:
    for field in _DIVIDED:
        if (value := _value(config, field)) % size:
            raise ValueError(f"tensor_parallel_size: {size} does not divide the model's {field}, {value}")


def _value(config: PreTrainedConfig, field: str) -> int:
    value = getattr(config, field, None)
    if value is None and field == "num_key_value_heads":
        value = config.num_attention_heads
    if not isinstance(value, int):
        raise ValueError(f"tensor_parallel_size: {config.model_type} has no number for {field} that could be divided")
    return value
