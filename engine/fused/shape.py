"""The Llama shape of a decoder layer: x += attention(norm(x)); x += down(silu(gate) * up)(norm(x)).

With rotation by halves and, as in Qwen 3, norms of queries and keys. Llama, Mistral, Qwen 2, Qwen 3 and most of their
descendants have it. Whether a layer really has it is not read off its name: what takes its place must answer as it does
(`engine.fused.replace`).
"""

from __future__ import annotations

from collections.abc import Set

import torch

from engine.dry_run import LayerAttention
from engine.parallel.modules import Summed

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def has_shape(layer: torch.nn.Module, attention: LayerAttention, *, summed: bool = False) -> bool:
    """Whether the layer has the modules of the Llama shape, and asks nothing else of attention.

    Args:
        summed: whether output and down projections may be one rank's summands.
    """
    if _names(layer) != _LAYER or attention.softcap is not None or attention.has_sinks:
        return False
    own, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
    if _names(own) not in (_ATTENTION, _ATTENTION | _HEAD_NORMS) or not is_gated_mlp(mlp, summed=summed):
        return False
    norms = [module for name, module in layer.named_modules() if name.endswith("norm")]
    return (
        _projects_linearly(own, summed)
        and _alike(own, "q_proj", "k_proj", "v_proj")
        and all(hasattr(norm, "weight") and hasattr(norm, "variance_epsilon") for norm in norms)
        and hasattr(own, "scaling")
    )


def is_gated_mlp(module: torch.nn.Module, *, summed: bool = False) -> bool:
    """Whether the module has those of down(activation(gate(x)) * up(x)); `summed` as of `has_shape`."""
    return _names(module) == _MLP and _projects_linearly(module, summed) and _alike(module, "gate_proj", "up_proj")


def _projects_linearly(block: torch.nn.Module, summed: bool) -> bool:
    projections = [child for name, child in block.named_children() if name.endswith("_proj")]
    linears = [child.inner if summed and isinstance(child, Summed) else child for child in projections]
    return all(type(linear) is torch.nn.Linear for linear in linears)


def _names(module: torch.nn.Module) -> Set[str]:
    return {name for name, _ in module.named_children()}


def _alike(block: torch.nn.Module, *names: str) -> bool:
    """Whether all or none of the linear layers have biases."""
    return len({getattr(block, name).bias is None for name in names}) == 1
