"""The Llama shape of a decoder layer: x += attention(norm(x)); x += down(silu(gate) * up)(norm(x)).

With rotation by halves and, as in Qwen 3, norms of queries and keys. Llama, Mistral, Qwen 2, Qwen 3 and most of their
descendants have it. Whether a layer really has it is not read off its name: what takes its place must answer as it does
(`engine.fused.replace`).
"""

from __future__ import annotations

from collections.abc import Set

import torch

from engine.dry_run import LayerAttention

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def has_shape(layer: torch.nn.Module, attention: LayerAttention) -> bool:
    """Whether the layer has the modules of the Llama shape, and asks nothing else of attention."""
    if _names(layer) != _LAYER or attention.softcap is not None or attention.has_sinks:
        return False
    own, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
    if _names(own) not in (_ATTENTION, _ATTENTION | _HEAD_NORMS) or _names(mlp) != _MLP:
        return False
    linears = [child for block in (own, mlp) for name, child in block.named_children() if name.endswith("_proj")]
    norms = [module for name, module in layer.named_modules() if name.endswith("norm")]
    return (
        all(type(linear) is torch.nn.Linear for linear in linears)
        and _alike(own, "q_proj", "k_proj", "v_proj")
        and _alike(mlp, "gate_proj", "up_proj")
        and all(hasattr(norm, "weight") and hasattr(norm, "variance_epsilon") for norm in norms)
        and hasattr(own, "scaling")
    )


def _names(module: torch.nn.Module) -> Set[str]:
    return {name for name, _ in module.named_children()}


def _alike(block: torch.nn.Module, *names: str) -> bool:
    """Whether all or none of the linear layers have biases."""
    return len({getattr(block, name).bias is None for name in names}) == 1
