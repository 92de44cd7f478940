"""Which checkpoints' configs the engine can serve, decided before a weight is read.

The dry run proves the rest: this names what it could only find late or describe badly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

_LAYER_TYPES = ("full_attention", "sliding_attention")
# Their frequencies depend on the longest position of the batch, so a sequence's keys would depend on its neighbours.
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")
_CAUSAL_HEADS = ("ForCausalLM", "LMHeadModel")


def check_supported(config: PreTrainedConfig) -> None:
    """Refuse what cannot be served.

    Raises:
        ValueError: names the feature.
    """
    problem = _architecture_problem(config) or _attention_problem(config)
    if problem:
        raise ValueError(f"{config.model_type}: {problem}")


def declared_windows(config: PreTrainedConfig) -> list[int | None]:
    """Sliding window of each layer: by `layer_types` where the family has them, else the same for all."""
    window = config.sliding_window if getattr(config, "sliding_window", None) else None
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        windowed = getattr(config, "use_sliding_window", True)
        return [window if windowed else None] * int(config.num_hidden_layers)
    return [window if layer_type == "sliding_attention" else None for layer_type in layer_types]


def _architecture_problem(config: PreTrainedConfig) -> str | None:
    if quantization := getattr(config, "quantization_config", None):
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        return f"unsupported quantization_config (quant_method {method!r}); use an unquantised checkpoint"
    if config.is_encoder_decoder:
        return "not a decoder-only model: it is an encoder-decoder"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "not a decoder-only model: transformers has no causal language model for it"
    architectures = config.architectures or []
    if architectures and not any(name.endswith(_CAUSAL_HEADS) for name in architectures):
        return f"not a decoder-only language model: its architecture is {', '.join(architectures)}"
    if config.sub_configs:
        return f"a composite model of {', '.join(config.sub_configs)}; only text models are served"
    return None


def _attention_problem(config: PreTrainedConfig) -> str | None:
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if getattr(model_class, "_is_stateful", False):
        return "it keeps a recurrent state (Mamba, a state space or linear attention), not keys and values alone"
    for index, layer_type in enumerate(getattr(config, "layer_types", None) or ()):
        if layer_type not in _LAYER_TYPES:
            return f"layer {index} has the unsupported type {layer_type!r}"
    if getattr(config, "kv_lora_rank", None):
        return "multi-head latent attention (MLA) keeps a compressed cache of its own"
    if _uses_alibi(config):
        return "ALiBi position biases are not supported"
    for rope_type in _rope_types(getattr(config, "rope_parameters", None)):
        if rope_type in _BATCH_DEPENDENT_ROPE:
            return f"RoPE of type {rope_type!r} depends on the longest position of the batch"
    return None


def _uses_alibi(config: PreTrainedConfig) -> bool:
    """Bloom always does; Falcon and MPT say so in their configs."""
    nested = getattr(config, "attn_config", None)
    return (
        config.model_type == "bloom" or bool(getattr(config, "alibi", False)) or bool(getattr(nested, "alibi", False))
    )


def _rope_types(parameters: Any) -> Iterator[str]:
    """All `rope_type`s in rope parameters, which may be nested by layer type."""
    if isinstance(parameters, Mapping):
        if isinstance(rope_type := parameters.get("rope_type"), str):
            yield rope_type
        for nested in parameters.values():
            yield from _rope_types(nested)
